/* ckca.h - v0.2.0 - keeps an image classifier learning while data keeps arriving. MIT or public domain, your choice:
   both licences are at the end of this file.

   Each new batch of labelled pictures improves the checkpoint you have, at a fixed cost in time and storage, without
   the old pictures. ResNets (or networks of your own), their training, loaders for pictures, and checkpoints that
   PyTorch reads, in one C99 header. Its only dependency is stb_image, which decodes JPEG and PNG.

   USE
       In exactly one C or C++ file:                            Everywhere else:
           #define CKCA_IMPLEMENTATION                               #include "ckca.h"
           #include "ckca.h"

   A WHOLE PROGRAM (examples/hello.c)

       // hello.c: trains a network, improves it when more pictures arrive, keeps the better one, and classifies a picture.
       #define CKCA_IMPLEMENTATION
       #include "ckca.h"

       int main(void) {
           static unsigned char pixels[308 * 256]; // 16 x 16, grey: faint stripes in noise
           static int labels[308];                 // 0: the stripes run across, 1: they run down
           ckca_array few = {pixels, labels, 8, 16, 16, 1, 2, NULL};
           ckca_array many = {pixels + 8 * 256, labels + 8, 300, 16, 16, 1, 2, NULL};
           ckca_model_desc net = {.height = 16, .width = 16, .channels = 1, .classes = 2};
           ckca_context *ctx = NULL;
           ckca_model *model = NULL;
           ckca_data *first = NULL, *more = NULL; // from files: ckca_open_folder(ctx, &more, "pictures", NULL)
           ckca_report report;
           float p[2]; // class probabilities
           for (int i = 0; i < 308 * 256; i++) {
               int down = labels[i / 256] = i / 256 % 2, line = down ? i % 16 : i / 16 % 16;
               pixels[i] = (unsigned char)(rand() % 236 + line / 2 % 2 * 20);
           }
           if (ckca_init(&ctx, NULL) || ckca_open_array(ctx, &first, &few, NULL) ||
               ckca_open_array(ctx, &more, &many, NULL) || ckca_resnet(ctx, &model, "resnet8", &net) ||
               ckca_update(model, first, NULL, NULL) || ckca_save(model, "net.safetensors") || // trains the network
               ckca_update(model, more, NULL, &report) || ckca_save(model, "new.safetensors") || // never makes it worse
               ckca_predict(model, pixels, 1, p))
               return fprintf(stderr, "hello: %s\n", ckca_error(ctx)), 1;
           if (report.verdict == CKCA_VERDICT_BETTER) rename("new.safetensors", "net.safetensors");
           printf("%.1f%% right, %.1f%% after the update\n", 100 * report.before.top1, 100 * report.after.top1);
           printf("picture 0: %.1f%% across, %.1f%% down\n", 100 * p[0], 100 * p[1]);
           ckca_data_free(first), ckca_data_free(more), ckca_model_free(model), ckca_context_free(ctx);
       }

   With a checkpoint and pictures of your own (new_pictures/CLASS/x.jpg; fit makes sizes and classes match the model):
       ckca_load(ctx, &model, "model.safetensors");
       fit = ckca_data_like(model);
       ckca_open_folder(ctx, &pictures, "new_pictures", &fit);
       ckca_update(model, pictures, NULL, &report);
       ckca_save(model, "updated.safetensors");
       if (report.verdict == CKCA_VERDICT_BETTER) rename("updated.safetensors", "model.safetensors");
   The update compares old and new network on pictures that it kept out of training: see NEVER WORSE.

   BUILD
       cc -O3 program.c -lm -pthread      (needs stb_image.h: Debian's libstb-dev)
       On a GPU: define CKCA_CUDA for program.c, compile ckca_cuda.cu with nvcc, link both (see ckca_cuda.cu).
   Built and tested with GCC and clang on x86-64 Linux, as C99 and C++11; vector kernels are chosen at run time. The
   AArch64 kernels are tested under emulation (qemu-user). Other compilers get plain loops, many times slower.

   OPTIONS, defined before the implementation
       CKCA_STATIC          makes every function static, so that several files can each have an implementation
       CKCA_API             prefix of public declarations, instead of extern (dllexport, say)
       CKCA_NO_STB_IMAGE    no JPEG and PNG: ckca_open_folder, ckca_read_picture and _memory fail with a message. (To
                            use your own stb_image.h, put it beside this header or include it first)
       CKCA_TURBOJPEG       libjpeg-turbo decodes JPEG (Debian: libturbojpeg0-dev; link -lturbojpeg), 1.4 to 2 times
                            as fast; bits differ slightly. stb_image still decodes PNG, CMYK, and JPEGs that it warns of
       CKCA_NO_STDIO        no file access: pictures come from arrays or ckca_read_picture_memory, checkpoints use
                            ckca_load_memory and ckca_save_memory; an update cannot be resumed
       CKCA_NO_SIMD         plain loops only
       CKCA_CUDA            the ops of ckca_cuda.cu instead of the host's
       CKCA_NO_THREADS      one thread only; the default where there are no POSIX threads
       CKCA_FILE            "its/name.h", if you rename this header (it includes itself once per instruction set)

   CONTENTS: search for a tag; each occurs here and at its section
       the API       >>context      threads, memory, errors
                     >>pictures     data sets: folders, CIFAR, MNIST, arrays; splits and joins
                     >>networks     ResNets by name
                     >>update       update, evaluate, predict
                     >>files        checkpoints
                     >>advanced     memory estimates, tensors, your own networks and training loops
       the library   >>shared       shared with ckca_cuda.cu: the context, sizes, random numbers
                     >>backend      the interface to host or GPU: device memory and ops
                     >>core         context, errors, memory, small files
                     >>data         pictures: stores and views, resizing, readers, splitting
                     >>stream       pictures read ahead of the trainer by decoder threads
                     >>model        layers, ResNets, the graph as text
                     >>train        one update from the top down: epochs, SGD steps, losses, batches, evaluation
                     >>execution    forward, backward, SGD; tensors
                     >>ranks        several processes: sums, agreement, comparisons
                     >>plan         memory planning: the address of every value and gradient
                     >>checkpoint   checkpoints and training states
                     >>memory       what REPLAY and EWC keep of earlier chunks
                     >>safetensors  the file format, and the JSON it needs
                     >>onnx         the network as an ONNX model
       the engine    >>reference    what every op computes, in plain loops: a readable ResNet
       for the CPU   >>threads      the thread pool
                     >>vector       vector kernels, compiled once per instruction set
                     >>ops          the ops: how work is divided, which kernel runs
       the end       >>licence      licence, history
   The path of a picture: ckca_open_folder decodes it into a store (DATA), or notes its path, and STREAM reads it
   ahead. ckca_update takes it, batch by batch, through ckca__train and ckca__step_ops (TRAINING) to ckca__run_forward,
   ckca__run_backward and ckca__run_sgd (EXECUTION), which call the ops of BACKEND. REFERENCE KERNELS shows what an op
   computes; VECTOR KERNELS and HOST OPS show how it is made fast.

   THE METHOD
       CKCA (Knowledge Consolidation and Acquisition): "Step Out and Seek Around: On Warm-Start Training with
       Incremental Data", Shen, Yin, Molchanov, Mao, Alvarez 2024, arXiv 2406.04484. Data arrives in chunks; classes
       and architecture stay the same. The first update trains from scratch. Each later one starts from the last
       checkpoint with a fresh learning-rate schedule, so that the weights leave the point they had converged to. Two
       loss terms preserve what the checkpoint knew and let the new data correct it; the checkpoint is the teacher,
       frozen, with running batch-norm statistics:

           loss = cross-entropy + w_kd AdaKD + w_feat FeatReg
           AdaKD   = T^2 mean_i a_i KL(softmax(zo_i / T) || softmax(z_i / T))      z, zo: student's, teacher's logits
           FeatReg = mean_i d(f_i, ...)                                           f: the student's pooled features

       The paper's own equations were not available when this was written. Its abstract states the purpose of the two
       terms, "forget mitigation and knowledge transfer" and to "retain and refine knowledge from existing checkpoints".
       The forms of a_i and d are this project's, and you can choose among them (ckca_adakd, ckca_featreg):

           GROWTH     a_i = g(n_old / n_new). The more pictures the checkpoint has learnt from (n_old, which it carries)
                      than the chunk holds (n_new), the more its answers weigh against the chunk's labels: little at the
                      second chunk, where it knows as much as the chunk, much at the tenth. g is 0.3 of the
                      ratio. Where g is large for an update's number of SGD steps, the whole loss is divided, or the
                      first steps would destroy what the checkpoint knows; ckca__growth is the one place that defines it.
           CENTROID   d = 1 - cos(f_i, mu[y_i]). mu[k] is the mean feature of class k over all pictures so far: after
                      each update the features of its pictures, by the updated network, join the means. They are the one
                      part of the old data that stays, classes x features numbers in the checkpoint. The teacher's
                      answers on new pictures can't give it again. A checkpoint without them (an older one, or another
                      program's) is given the teacher's means of the first chunk, for that update; its own begin there.

       Pictures without labels (ckca_update_desc.unlabelled) join AdaKD: the teacher's answers need none.
       tests/MEASUREMENTS.md has the figures behind the defaults, and those of the other forms.

   NETWORKS THAT OTHERS TRAINED
       torchvision's weights become a safetensors file in Python: safetensors.torch.save_file(model.state_dict(), path).
       ckca_resnet builds the network by name, with ImageNet's mean and std (CKCA_IMAGENET_MEAN, _STD) and classes of
       your own; ckca_load_backbone loads everything but the head. Then, from fast to slow: ckca_imprint sets the head
       from class means in one pass; ckca_freeze(model, NULL) and ckca_update train the head alone; ckca_learning_rate
       (model, NULL, 0.1f) and ckca_update train everything, the backbone at a tenth of the rate. examples/finetune.c
       does all three. ckca_add_classes widens the head when classes arrive later.

   DEFINITIONS
       picture    height x width x channels bytes, row by row, channels innermost (NHWC), as stb_image gives them
       N, K, D    pictures in a batch, classes (or output channels), features
       chunk      the pictures of one update
       held out   kept out of training, to test on
       update     one call of ckca_update: the paper's time step (ckca_model_info.updates, ckca_report.updates,
                  ckca_progress.update, ckca.step in a checkpoint)
       SGD step   forward and backward over one batch, and one change of the weights (ckca_report.steps)
       epoch      one pass over a chunk
       logits     the network's K outputs before the softmax
       features   the D inputs of the layer that computes the logits
       head       the layer that computes the logits; the backbone is all others
       student    the network in training
       teacher    the checkpoint it started from, or ckca_update_desc.teacher
       memory     what is kept of earlier chunks beside the checkpoint, if anything: ckca_update_desc.memory
       Tensors are float32 (but see CKCA_PRECISION_BF16). Files and ckca_tensor_* use PyTorch's order (convolutions K x
       C x R x S); in memory it is K x R x S x C. A linear layer on a map larger than 1 x 1 takes it in NHWC order.

   OWNERSHIP AND THREADS
       You free what you create (ckca_*_free; NULL is allowed), data and models before their context. A call that
       creates an object sets your pointer on success and leaves it unchanged on failure (but see ckca_init), so
       initialise it to NULL. Strings, descriptors and arrays that you pass in are copied or not needed after the call;
       what is "owned by" an object stays valid as long as the object.
       A context and all its objects belong to one thread at a time; contexts share nothing. A context runs
       ckca_desc.threads - 1 threads of its own: the first call with work for them creates them, they sleep between
       calls, and ckca_context_free ends them. Results are bitwise the same for any number of threads. After fork() the
       child may use a context that was idle at the fork; it creates new threads. On a GPU it may not, since CUDA does not
       share a device context with a child: there the child can only free its copies, which releases host memory alone.

   ERRORS
       Every call that can fail returns a ckca_status, and ckca_error(ctx) then holds one sentence with the real names
       and numbers in it. Nothing is printed, nothing exits. After a failure the objects, and the pointers that were to
       receive new ones, are as before the call. A call on a NULL object has no context to hold a sentence: it returns
       only CKCA_EINVAL. (GPU errors appear at the next synchronisation: CKCA_ECUDA, with the CUDA call's name.)
       Files may be hostile: lengths are checked before use, and truncated or corrupt files are refused.
       Files are written to PATH.tmp and renamed: PATH is always the complete old or new file. The next write overwrites
       a PATH.tmp that a killed process left behind.
       Infinite or NaN weights and statistics are CKCA_ENAN: at the end of ckca_update, on save and on load.

   ZERO MEANS DEFAULT
       memset a descriptor to 0 (or = {0}; in C++ = {}) and set what you care about. To switch off what is on by default, set the
       field to CKCA_OFF. Other negative values, NaN and infinity are refused. ckca_update_defaults returns the values
       that zeros stand for in an update. A descriptor without required fields may be NULL: ckca_init, ckca_open_*,
       ckca_split, ckca_update.

   NEVER WORSE
       An update of few or wrongly labelled pictures can make a network worse. So an update of a trained network holds
       out a fifth of the new pictures (ckca_update_desc.holdout) and, after training, compares the old network and the
       new one on them: won and lost are the pictures that only the new, only the old one is right on, and p is the
       chance that a difference as large comes about if both networks are equally good (McNemar's exact test,
       two-sided: Psychometrika 12, 1947). The new network is kept if won > lost and p <= 0.25 (keep_better);
       otherwise, on a tie and where there are too few pictures to tell, the model stays the old one. ckca_report
       has the verdict.
       Small chunks: pictures are held out only if that makes 10 or more, so 48 new pictures or more; below that the new
       network is kept untested (CKCA_VERDICT_UNTESTED), unless you have pictures to test on (holdout_data). One picture
       of every class always stays in training. A first update and SCRATCH hold none out: there is nothing to lose, or
       the old network was trained on these pictures.
       Repeated updates: at most one update in eight that leaves the network as good as before is kept by luck, and
       worse ones less often. In 20 updates that are all worse, by whatever size is worst, accuracy falls by more than
       one such test can detect (1.96 standard errors of the difference) with a probability of 2%; if any lead
       counted (keep_better 1), of up to 80%. The price: of good updates on few pictures many stay undecided. Keep their
       pictures and pass them again together with the next ones, or test on a larger set of your own.
       What it cannot see: held-out pictures share the faults of the new ones. If all are from another source than those
       that the network will meet, or a class is labelled as another throughout, learning that is an improvement on
       them. Only a set of your own (holdout_data) that you trust shows it.

   KILLED RUNS
       With ckca_update_desc.state = "net.state", ckca_update writes a training state to that file every state_seconds,
       when it is stopped (CKCA_ESTOP) and at its end. If a run is killed, the same calls with the same arguments resume
       from the file and give bitwise the same result. The file remains when ckca_update returns, since it holds the
       unsaved result; the model's next ckca_save removes it. If you keep the result in another way, remove the file
       yourself. One file serves one update at a time: save its result before the next update with that file. To resume
       after CKCA_ESTOP, load the model that the update began with again: the stopped one has other weights.
       The state of another update (other pictures, weights, memory or settings) is refused with CKCA_EINVAL, never overwritten.
       During an update net.state.lock is locked (flock), and a second update with that state fails with CKCA_EIO. The
       lock ends with its process. Systems and file systems without flock have no such check.

   BUDGETS
       ckca_update_desc.memory_mb bounds what an update allocates beside the model's weights and the pictures. It
       lowers batch (from its value or 64) to the largest that fits; ckca_update_defaults shows it. If not even a batch
       of 1 fits, the update fails with CKCA_EINVAL. A smaller batch usually wants a smaller lr.
       ckca_update_desc.seconds bounds the time of the call. A few SGD steps are timed and undone; then as many whole
       epochs are planned, up to epochs, as fit into nine tenths of the time that is left, with the warm-up and the
       steps of the schedule shortened in proportion, so that it still ends as a whole one does. If not even one epoch
       fits, the update fails with CKCA_EINVAL and says for how many pictures there is time. The plan is made once: a
       machine that becomes slower later takes longer. Two runs may plan different numbers of epochs (ckca_report.epochs),
       and then differ; each is bitwise the update with those epochs, warmup_epochs and step_epochs and no limit. A
       training state holds the plan, so a killed run resumes to bitwise the result that it was going to have; the time
       before the kill does not count.
   SEVERAL PROCESSES
       Processes (ranks) that train one model together, on one machine or several, each have a context with
       ckca_desc.ranks: its rank, their number, and two collective operations, sum and broadcast. examples/mpi.h fills it
       with MPI. Each rank has the whole data set and the whole model and makes the same calls in the same order.
       - ckca_update: the pictures of every batch are shared out; ckca_update_desc.batch counts those of all ranks. Each
         rank computes the mean gradient of its part; the sum over ranks, weighted by the parts' sizes, is the gradient
         of the batch (to rounding), also where ranks do not divide the batch. It is summed in buckets of at least
         1 MiB, from the last layer on, while the backward pass runs on. All ranks hold bitwise the same weights after
         every step; hashes are compared after every epoch. The same number of ranks gives bitwise the same result again,
         also after a resume; another number gives another rounding, and its training states are refused.
       - What a loss term or layer computes across the pictures of a batch, it computes across a rank's part: batch
         norm's statistics, as PyTorch's DDP does. Rank 0's running statistics are sent to all at the end of ckca_update,
         also if it is stopped.
       - ckca_evaluate, and the teacher's evaluation in ckca_update, share out blocks of pictures; counts are summed
         exactly. Every rank gets the result of all.
       - ckca_save and training states: rank 0 writes, the others wait for it and touch no files, also at a resume.
         ckca_load, ckca_open_* and every call that is not named here work on each rank by itself.
       - A failure on one rank in these calls (and in ckca_init) fails the call on all, with its status and one sentence
         that begins with its rank; so does a progress callback that stops. Ranks that differ in build, instruction set,
         pictures, weights or settings fail with CKCA_ERANKS before the first step. A rank that dies cannot tell: its
         transport must end the others, or make their callbacks fail (CKCA_ERANKS). The last training state stays.
       - Elsewhere a rank that fails must end the others (MPI_Abort), or tell them with ckca_agree.
       - CENTROID's class means are summed over ranks. ckca_update_desc.seconds and patience need one process.
       A new loss term that is a mean over the batch needs nothing. Whatever else depends on pictures of other ranks must
       be summed over them: the section RANKS says how.
   STREAMING
       Pictures of a folder or list are held decoded at the input size if that takes at most ckca_data_desc.budget_mb
       (4 GiB), else they stay on disk; ckca_data_desc.storage chooses one form, also the bytes of the files in memory.
       Pictures on disk, or as bytes, are decoded for every batch, ahead of the trainer, by as many decoder threads as
       the context has threads (one thread: by the caller, batch by batch). The order of pictures, augmentation and
       results are bitwise the same in every form and for any number of threads, also after a resume.
       Memory, whatever the set's size: per picture 72 bytes and its path (opening a folder needs some 200
       bytes more per picture for a while); a ring of 4 batches, 4 x batch x height x width x channels bytes (one thread:
       1 batch); and per decoder thread what its largest picture needs: the file, its decoded pixels up to three times,
       and height x width x channels bytes. Nothing is allocated per batch: decoder threads have memory of their own,
       also for stb_image, which grows (with malloc) only for a picture that needs more than all before it. TurboJPEG,
       and an stb_image that your program included first, allocate for every picture.
       A model without mean and std measures them on all pictures first: one more pass. Give them to save it. So does an
       update with a teacher, to measure that.
       A file is identified by its path, size and time of last change (in seconds): if size or time differ from what they
       were when the set was opened, reading it fails. Training states know pictures on disk by those three, others by
       their bytes. A file that cannot be read or decoded in the middle of an epoch fails the call with its path. With
       skip_unreadable it is counted instead (ckca_data_info.unreadable): in training, the readable picture before it in
       its batch (or the batch's first) takes its place, in evaluation it does not count. A batch without any readable
       picture fails.

   FILE FORMATS
       Checkpoints are safetensors with torchvision's parameter names; safetensors.torch.load_file and load_state_dict
       read them. The metadata, as text:
           format                 pt, which PyTorch's readers require
           ckca.format            1; rises when an older ckca.h would misread the file, which it then refuses
           ckca.version           CKCA_VERSION of the writer
           ckca.graph             the network, so that ckca_load needs nothing else (zero_residual, which only fresh
                                  weights know, is not in it)
           ckca.arch              the builder's name, or custom
           ckca.input             height width channels
           ckca.classes           the number of classes
           ckca.class_names       their names as a JSON list, if known
           ckca.mean, ckca.std    per channel, if known
           ckca.step              the number of updates done
           ckca.pictures          the number of distinct pictures that they trained on, if known
           ckca.class_counts      pictures behind the mean of each class (FeatReg's CENTROID), int64
           ckca.class_means       classes x features means, float32; both little-endian, in base64
       Training states are such files with tensors momentum.*, with patience best.* (the best epoch's weights), and
       ckca.state (the update and its progress).
       Memories (ckca_memory_save) are safetensors files too:
           pictures               U8, M x height x width x channels: of every class its first choice, then of every class
                                  its second, and so on, so the first pictures of a memory are a smaller one
           labels                 I32, M, each 0 to classes - 1
           seen                   I64, classes: how many pictures of each class there have been, kept or not
           fisher.*               F32: the Fisher information, with the names and shapes of the checkpoint's parameters
       and metadata ckca.format, ckca.version, ckca.class_names (if it has pictures) and ckca.memory: the most pictures
       that it keeps, 1 if it keeps the Fisher information, and the number of the checkpoint's updates. The first three
       tensors are absent while it has no picture, fisher.* if it keeps none.
       Pictures are JPEG (baseline, extended and progressive, Huffman-coded, 8 bits per sample; grey, YCbCr, RGB, and
       CMYK with an Adobe segment) and PNG (all kinds; alpha is dropped, 16 bits are reduced to 8). Both are rotated and
       mirrored as their EXIF orientation says, unless ckca_data_desc.as_stored is set; sizes, crops and limits apply
       after that. Each file is validated before stb_image decodes it. In a JPEG, missing tables or scans and missing,
       extra, misplaced or disordered restart markers are refused; without its end marker it is read if its data is
       complete. Its data is checked code by code only if it has restart markers or no end marker: other data that ends
       early, in front of an end marker, is read as other readers do, with grey for the rest (but data with fewer bits
       than its blocks need at least is refused). In a PNG, the checksum of every chunk (CRC-32) is checked, that of the
       pixels (Adler-32) is not.

   OTHER PROGRAMS, OTHER LANGUAGES
       ckca_save_onnx writes a network for ONNX Runtime and other programs that read ONNX. make shared builds
       build/libckca.so, which has the public names and no others; make install-shared installs it, with ckca-shared.pc.
       Structures have no bit-fields and no unions. A binding should compare ckca_version and ckca_struct_size with its
       own before any other call: examples/ckca.py (ctypes) reads this header for that.
       Go, with cgo:
           // #cgo LDFLAGS: -lckca
           // #include <ckca.h>
           import "C"  ...  if C.ckca_load(ctx, &model, path) != C.CKCA_OK { log.Print(C.GoString(C.ckca_error(ctx))) }
       Rust, with bindgen ckca.h --allowlist-function 'ckca_.*' --allowlist-type 'ckca_.*' -o ckca.rs:
           include!("ckca.rs");
           let status = unsafe { ckca_load(ctx, &mut model, path.as_ptr()) };
           assert_eq!(unsafe { ckca_struct_size(name.as_ptr()) } as usize, std::mem::size_of::<ckca_update_desc>());

   VERSIONS
       CKCA_VERSION is MAJOR.MINOR.PATCH. A new PATCH changes no declaration. A new MINOR may add declarations and
       change defaults and the bits of results; before 1.0.0 it may also change declarations, after that only a new
       MAJOR may. Every version reads the checkpoints of all earlier ones. Only the version that wrote a training
       state reads it.
*/
#ifndef CKCA__PASS
#ifndef CKCA_H
#define CKCA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef CKCA_API
#ifdef CKCA_STATIC
#define CKCA_API static
#else
#define CKCA_API extern
#endif
#endif

#define CKCA_VERSION "0.2.0"
#define CKCA_VERSION_MAJOR 0
#define CKCA_VERSION_MINOR 2
#define CKCA_VERSION_PATCH 0

/* Switches off a term or setting whose field, left at 0, would take its default. */
#define CKCA_OFF (-1.0f)

/* ===================================================================================================================
   API: CONTEXT                                                                                              >>context

   The context: threads, memory, errors. Every other object belongs to one.
   =================================================================================================================== */

typedef enum ckca_status {
    CKCA_OK = 0,
    CKCA_EINVAL,  /* an argument or a field of a descriptor is invalid */
    CKCA_ESHAPE,  /* shapes do not match */
    CKCA_ENOMEM,  /* an allocation failed */
    CKCA_EIO,     /* opening, reading, writing or renaming a file failed */
    CKCA_EFORMAT, /* a file is truncated, corrupt or in another format */
    CKCA_ENAN,    /* the loss, weights or running statistics are infinite or NaN */
    CKCA_ESTOP,   /* the progress callback asked to stop */
    CKCA_ECUDA,   /* a call of CUDA or its libraries failed */
    CKCA_ERANKS   /* several processes: they differ, or their connection failed */
} ckca_status;

/* Instruction sets of the host kernels. */
typedef enum ckca_isa {
    CKCA_ISA_BEST = 0, /* the best that the processor and the build support */
    CKCA_ISA_PLAIN,    /* plain loops */
    CKCA_ISA_BASE,     /* what every processor of the architecture has: SSE2 or NEON */
    CKCA_ISA_AVX2,
    CKCA_ISA_AVX512,
    CKCA_ISA_COUNT /* not a value: the number of values, here and below */
} ckca_isa;

/* Precision of the factors in the GPU's convolutions and linear layers; weights, sums, statistics, features, logits,
   losses and SGD are float32 in all three. The host supports only FLOAT32: ckca_init fails with another. */
typedef enum ckca_precision {
    CKCA_PRECISION_FLOAT32 = 0,
    CKCA_PRECISION_TF32, /* tensor cores, factors rounded to 10 bits of mantissa (needs compute capability 8.0) */
    CKCA_PRECISION_BF16, /* tensor cores, factors rounded to 7 bits of mantissa (needs 8.0). The maps before the average
                            pooling, and their gradients, are stored in bfloat16 too: half the memory and traffic. A
                            network without average pooling keeps them in float32 and multiplies in TF32 */
    CKCA_PRECISION_COUNT
} ckca_precision;

typedef struct ckca_context ckca_context; /* threads, memory, errors; one per thread of yours */
typedef struct ckca_model ckca_model;     /* a network, its weights and training buffers */
typedef struct ckca_data ckca_data;       /* labelled pictures: a view of a shared store of bytes */

/* Several processes that train one model, see SEVERAL PROCESSES. The callbacks are called by the thread that uses the
   context, in the same order on all ranks, and return 0 or, if the connection is broken, another value; no callback is
   called after that. Only host memory is passed to them. */
typedef struct ckca_ranks {
    int rank, size; /* this process, 0 to size - 1, of size, 1 to 4096 */
    /* Starts to replace values[0..count) on all ranks by their sum over ranks, bitwise the same on every rank and in
       every run with as many ranks. May return before it is done; other sums may follow. */
    int (*sum_start)(float *values, size_t count, void *user);
    int (*sum_wait)(void *user); /* waits for all sums that have been started */
    int (*sum_poll)(void *user); /* called often while sums are under way, for transports that need it; or NULL */
    /* Copies rank 0's bytes[0..count) to all. No sum is under way then. */
    int (*broadcast)(void *bytes, size_t count, void *user);
    void *user; /* passed to the callbacks */
} ckca_ranks;

typedef struct ckca_desc {
    int threads;     /* 0 to 4096; 0: one per online processor; 1 if built without threads */
    ckca_isa isa;    /* of the host kernels; ckca_init fails if the processor or the build lacks it */
    int no_winograd; /* 1: direct convolution only: slower, rms error 3e-7 of the output's rms instead of 1e-6 */
    ckca_precision precision; /* of the GPU's convolutions and linear layers */
    /* Set both or neither (NULL: malloc, with huge pages requested, and free). Called by one thread at a time, but not
       always by yours: decoding calls them from the context's threads. alloc returns NULL on failure. stb_image,
       TurboJPEG and the memory of decoder threads (see STREAMING) use malloc and calloc. */
    void *(*alloc)(size_t bytes, void *user);
    void (*release)(void *memory, size_t bytes, void *user);
    void *user; /* passed to alloc and release */
    const ckca_ranks *ranks; /* copied; NULL: one process. All ranks call ckca_init, which compares their builds */
} ckca_desc;

/* Creates a context. desc may be NULL. After CKCA_EINVAL or CKCA_ECUDA (no usable GPU) *ctx serves only ckca_error and
   ckca_context_free; after CKCA_ENOMEM it is NULL. */
CKCA_API ckca_status ckca_init(ckca_context **ctx, const ckca_desc *desc);
/* Several processes: waits until all ranks have called it. If one of them passed a failure, it returns that failure (the
   lowest rank's) on all of them, with that rank's ckca_error. One process: returns status. */
CKCA_API ckca_status ckca_agree(ckca_context *ctx, ckca_status status);
/* Frees a context; free its models and data first. NULL is allowed, here and in every ckca_*_free. */
CKCA_API void ckca_context_free(ckca_context *ctx);
/* The last failure in one sentence, or "". Owned by the context, valid until its next failing call. If ctx is NULL, the
   sentence says that there is no context. */
CKCA_API const char *ckca_error(const ckca_context *ctx);
/* "ok", "bad argument", ... for any status. */
CKCA_API const char *ckca_status_name(ckca_status status);
/* For bindings of other languages, to refuse a library that their declarations do not fit: its CKCA_VERSION, and the
   sizeof of a public structure by name ("ckca_update_desc"); 0: there is none of this name. */
CKCA_API const char *ckca_version(void);
CKCA_API size_t ckca_struct_size(const char *name);
/* The device that runs the kernels, for example "host avx512 x2" or "cuda NVIDIA H100 tf32". Owned by the context. */
CKCA_API const char *ckca_device(const ckca_context *ctx);

/* ===================================================================================================================
   API: DATA                                                                                                >>pictures

   Labelled pictures from folders, CIFAR and MNIST files, and memory; splits and joins.
   =================================================================================================================== */

/* How the pictures of a folder or list are kept. Order, augmentation and results are bitwise the same in all forms. */
typedef enum ckca_storage {
    CKCA_STORAGE_AUTO = 0,   /* DECODED if that takes at most budget_mb, else STREAM */
    CKCA_STORAGE_DECODED,    /* in memory, at height x width */
    CKCA_STORAGE_COMPRESSED, /* in memory, as the bytes of their files */
    CKCA_STORAGE_STREAM,     /* on disk: paths, labels, sizes and times are in memory */
    CKCA_STORAGE_COUNT
} ckca_storage;

/* The format that pictures are converted to when a set is opened. */
typedef struct ckca_data_desc {
    int height, width;              /* 1 to 16384; 0: as in the data (a folder: as its first picture). Other sizes are
                                       resized to cover height x width (triangle filter, antialiased, as Pillow's
                                       BILINEAR) and centre-cropped */
    int short_side;                 /* 0: as above. Else every picture is resized to this short side, and height x width
                                       are cropped from its centre (torchvision's Resize and CenterCrop: 256 and 224,
                                       say). From height and width to 16384 */
    int channels;                   /* 1 or 3; 0: as in the data (a folder: 3). Grey is copied to 3 channels, colour is
                                       averaged to 1 with the weights of ITU-R BT.601 */
    int classes;                    /* length of class_names; 0: as many as the data has. Without class_names the data
                                       must have exactly this many */
    const char *const *class_names; /* the labels' names in order, copied; a picture of any other class is an error.
                                       CIFAR's classes are matched by name, those of IDX, which has no names, by number.
                                       NULL: as in the data */
    int as_stored;                  /* 1: ignore the EXIF orientation of picture files; 0: apply it */
    int skip_unreadable;            /* folders, lists: 1: unreadable pictures are skipped and counted (ckca_data_info);
                                       0: the first one is an error. See STREAMING */
    ckca_storage storage;           /* folders, lists: how the pictures are kept; others are DECODED. See STREAMING */
    int budget_mb;                  /* folders, lists: most MiB that DECODED or COMPRESSED pictures may take, up to
                                       2^24; 0: 4096. More is an error, with AUTO it means STREAM */
} ckca_data_desc;

typedef enum ckca_part { CKCA_PART_TRAIN = 0, CKCA_PART_TEST = 1 } ckca_part;

typedef struct ckca_data_info {
    int count, height, width, channels, classes;
    const char *const *class_names; /* classes, owned by the data */
    ckca_storage storage;           /* how its pictures are kept; after ckca_join of several forms, the last of them in
                                       the order of ckca_storage */
    /* Of the folder that the pictures came from, when it was opened; 0 and NULL for other sources: */
    int left_out;                 /* files of other types, all files and broken links beside the class folders, and
                                     links to dir or to a folder above it, which are not followed */
    int unreadable;               /* pictures that skip_unreadable skipped, when opened or later (see STREAMING) */
    const char *first_unreadable; /* path and fault of the first one, owned by the data; NULL: none */
} ckca_data_info;

#ifndef CKCA_NO_STDIO
/* Reads DIR/CLASS/picture.{jpg,jpeg,jpe,jfif,png} (in any case), also in folders up to 32 levels below CLASS. A folder
   that several links lead to is read once. Classes are sorted by the bytes of their names unless desc names
   them; the pictures of a class are sorted folder by folder, as in torchvision's ImageFolder. A class folder without
   pictures (with skip_unreadable: without readable ones) is an error unless desc names the classes; a class name that
   is not UTF-8 is an error. Names that begin with a dot, Thumbs.db and desktop.ini are ignored; other files, and links
   to dir or to a folder above it, are counted in ckca_data_info.left_out. Decoding runs in parallel. Limits: 16384
   pixels per side and 64 Mi pixels per picture, 256 MiB per file (see FILE FORMATS), and 4 Mi pixels for a first
   picture that gives the set its size. With CKCA_NO_STB_IMAGE the call only fails. */
CKCA_API ckca_status ckca_open_folder(ckca_context *ctx, ckca_data **data, const char *dir, const ckca_data_desc *desc);
/* The pictures that a text file lists: one line PATH<TAB>LABEL each, LABEL a number from 0. PATH is relative to the
   folder of the list unless it begins with /. The number of classes is desc->classes, or the highest label + 1; a label
   beyond it, an incomplete line and a zero byte are errors with the line's number. Lines may end in \r\n, empty lines
   are ignored; 1 GiB at most. Pictures, their limits and CKCA_NO_STB_IMAGE: as with ckca_open_folder. */
CKCA_API ckca_status ckca_open_list(ckca_context *ctx, ckca_data **data, const char *path, const ckca_data_desc *desc);
/* The unpacked binary versions of CIFAR-10 and CIFAR-100: data_batch_{1..5}.bin and test_batch.bin, or train.bin and
   test.bin (fine labels), in dir or its subfolder cifar-10-batches-bin or cifar-100-binary. Class names come from
   batches.meta.txt or fine_label_names.txt if present. */
CKCA_API ckca_status ckca_open_cifar10(ckca_context *ctx, ckca_data **data, const char *dir, ckca_part part,
                                       const ckca_data_desc *desc);
CKCA_API ckca_status ckca_open_cifar100(ckca_context *ctx, ckca_data **data, const char *dir, ckca_part part,
                                        const ckca_data_desc *desc);
/* MNIST's format: {train,t10k}-images-idx3-ubyte and -labels-idx1-ubyte in dir, or in its subfolder raw, MNIST/raw or
   FashionMNIST/raw. */
CKCA_API ckca_status ckca_open_idx(ckca_context *ctx, ckca_data **data, const char *dir, ckca_part part,
                                   const ckca_data_desc *desc);
#endif
/* Pictures of your own. All fields are copied. desc may be NULL; its classes and class_names are ignored. */
typedef struct ckca_array {
    const unsigned char *pixels;    /* count x height x width x channels */
    const int *labels;              /* count, each 0 to classes - 1 */
    int count;                      /* at least 1 */
    int height, width;              /* 1 to 16384 */
    int channels;                   /* 1 or 3 */
    int classes;                    /* 1 to 1000000 */
    const char *const *class_names; /* classes, UTF-8, all different; NULL: "0", "1", ... */
} ckca_array;
CKCA_API ckca_status ckca_open_array(ckca_context *ctx, ckca_data **data, const ckca_array *array,
                                     const ckca_data_desc *desc);

#ifndef CKCA_NO_STDIO
/* Decodes a picture file into out, height x width x channels bytes; desc must set all three. */
CKCA_API ckca_status ckca_read_picture(ckca_context *ctx, const char *path, const ckca_data_desc *desc,
                                       unsigned char *out);
#endif
/* Decodes the bytes of a JPEG or PNG file in the same way. */
CKCA_API ckca_status ckca_read_picture_memory(ckca_context *ctx, const void *bytes, size_t size,
                                              const ckca_data_desc *desc, unsigned char *out);

/* Splits data into n random disjoint parts of equal size (within one picture if desc->size is 0) and writes them to
   parts[0..n). Each part is a view, which you free with ckca_data_free. desc may be NULL. */
typedef struct ckca_split_desc {
    int size;       /* pictures in each part; 0: all pictures, divided by n */
    int stratified; /* 1: every part has the class proportions of data, to within one picture per class */
    uint64_t seed;
} ckca_split_desc;
CKCA_API ckca_status ckca_split(const ckca_data *data, int n, const ckca_split_desc *desc, ckca_data **parts);
/* Joins n sets of one context, which must agree in height, width, channels and classes. Views of one store share it;
   others are copied (of pictures on disk, only their paths). n below 1: CKCA_EINVAL without a sentence, since there is
   no context to hold it. */
CKCA_API ckca_status ckca_join(ckca_data **joined, ckca_data *const *parts, int n);
/* A view of the pictures at index[0..n), each 0 to count - 1; repeats are allowed. */
CKCA_API ckca_status ckca_subset(ckca_data **subset, const ckca_data *data, const int *index, int n);

/* All zeros if data is NULL. */
CKCA_API void ckca_data_info_get(const ckca_data *data, ckca_data_info *info);
/* Label of picture i, 0 to classes - 1; -1: no picture i. */
CKCA_API int ckca_label(const ckca_data *data, int i);
/* Picture i, height x width x channels bytes owned by data; NULL: no picture i, or it is not held decoded. */
CKCA_API const unsigned char *ckca_pixels(const ckca_data *data, int i);
/* Writes picture i, height x width x channels bytes, to out, however it is kept. */
CKCA_API ckca_status ckca_copy_pixels(const ckca_data *data, int i, unsigned char *out);
/* A hash of all labels and pictures in order (of those on disk: path, size and time of their files): what a training
   state compares, too. 0 if data is NULL. */
CKCA_API uint64_t ckca_data_fingerprint(const ckca_data *data);
CKCA_API void ckca_data_free(ckca_data *data);

/* ===================================================================================================================
   API: MODELS                                                                                              >>networks

   ResNets by name. Networks of your own are in API: ADVANCED.
   =================================================================================================================== */

typedef struct ckca_model_desc {
    int height, width, channels;    /* of the input; 0: 32, 32, 3. Sides up to 65536 */
    int classes;                    /* required, 1 to 1000000 */
    const char *const *class_names; /* classes, copied; NULL: taken from the first data it is trained on */
    const float *mean, *std;        /* channels each, of pictures scaled to 0..1, copied; NULL: measured on that data */
    uint64_t seed;                  /* of the initial weights */
    int width_base;                 /* ResNets: channels of the first stage, up to 4096; 0: 16 for CIFAR ResNets, 64 for
                                       ImageNet ResNets */
    int projection;                 /* CIFAR ResNets: 1: shortcuts are 1 x 1 convolutions (option B of He et al.);
                                       0: they subsample and zero-pad (option A) */
    int zero_residual;              /* ResNets: 1: the last batch norm of every residual branch starts at weight 0 */
} ckca_model_desc;

/* A ResNet by name: "resnet8", 20, 32, 44, 56, 110 (He et al. 2016, section 4.2); torchvision's "resnet18", 34, 50,
   101, 152 (section 4.1), "wide_resnet50_2" (Zagoruyko and Komodakis 2016) and "resnext50_32x4d" (Xie et al. 2017), for
   any size of picture; "resnet18-cifar" and so on (these with a 3 x 3 stem of stride 1 and no max pooling). */
CKCA_API ckca_status ckca_resnet(ckca_context *ctx, ckca_model **model, const char *arch, const ckca_model_desc *desc);

typedef struct ckca_model_info {
    const char *arch; /* the builder's name, or "custom" */
    int height, width, channels, classes, features;
    const char *const *class_names; /* classes; NULL: not known before the first update */
    const float *mean, *std;        /* channels; NULL: not known before the first update */
    int updates;                    /* updates done; 0: an untrained network */
    int64_t pictures;               /* distinct pictures that the updates trained on; 0: not known */
    int64_t parameters;             /* number of trainable values */
    int nodes, logits;              /* number of nodes; index of the logits node */
} ckca_model_info;
/* All zeros if model is NULL; features and logits are 0 until it is finished. */
CKCA_API void ckca_model_info_get(const ckca_model *model, ckca_model_info *info);
/* A data descriptor with the height, width, channels and classes of the model (class_names owned by the model). */
CKCA_API ckca_data_desc ckca_data_like(const ckca_model *model);
/* Copies a finished model within its context: graph, weights, names and number of updates, but not gradients and
   momentum. */
CKCA_API ckca_status ckca_model_copy(ckca_model **copy, const ckca_model *model);
CKCA_API void ckca_model_free(ckca_model *model);

/* Freezes the layers whose name begins with prefix and a '.' or is it ("layer1", "layer1.0.bn1"; "": all; NULL: all but
   the head, the layer of the logits). A frozen layer's weights no longer change, weight decay included, and a frozen
   batch norm keeps its running statistics and normalises with them, in training too. What comes before the first layer
   that is trained runs as in evaluation and costs no gradients, neither time nor memory. If that is all but the head
   and nothing is augmented, ckca_update computes the features of the pictures once. Frozen layers keep their weights
   also under CKCA_METHOD_SCRATCH and SHRINK_PERTURB. Freezing is a setting for training: no checkpoint holds it, and an
   update resumes from its training state only under the same. Gradients and momentum of the model are dropped. */
CKCA_API ckca_status ckca_freeze(ckca_model *model, const char *prefix);
/* Multiplies the learning rate of the same layers by factor, 0 to 1e6: 0.1 for a pre-trained backbone, say. 0 freezes
   them, any other value thaws them. */
CKCA_API ckca_status ckca_learning_rate(ckca_model *model, const char *prefix, float factor);

/* ===================================================================================================================
   API: TRAINING                                                                                              >>update

   Update, evaluate, predict.
   =================================================================================================================== */

/* Augmentation, a pure function of (seed, epoch, picture). Zero fields are off. */
typedef struct ckca_augment {
    int pad;          /* pixels, up to 4096: zero-pad each side by this many, then crop at random */
    int flip;         /* 1: mirror left to right with probability 1/2 */
    int resized_crop; /* 1: instead of pad, crop a random part of aspect 3/4 to 4/3 of the full-size picture and resize
                         it (as torchvision's RandomResizedCrop). Pictures of a DECODED folder that were resized are
                         read from their files again for this; those of arrays, CIFAR and MNIST are cropped as opened */
    float crop_min;   /* least fraction of the picture's area that is cropped, up to 1; 0: 0.25 */
    float jitter;     /* 0 to 1: scale brightness, contrast, saturation each by a random 1 - jitter to 1 + jitter */
} ckca_augment;

typedef enum ckca_schedule {
    CKCA_SCHEDULE_COSINE = 0, /* from lr to 0 */
    CKCA_SCHEDULE_CONSTANT,
    CKCA_SCHEDULE_STEP, /* lr, times step_factor every step_epochs */
    CKCA_SCHEDULE_COUNT
} ckca_schedule;

typedef enum ckca_method {
    CKCA_METHOD_CKCA = 0,       /* warm start + AdaKD + FeatReg */
    CKCA_METHOD_SCRATCH,        /* fresh weights: SCRATCH_CHUNK or, on joined chunks, SCRATCH_ALL */
    CKCA_METHOD_WARM,           /* vanilla warm start */
    CKCA_METHOD_SHRINK_PERTURB, /* Ash and Adams 2020: w = shrink w + perturb w_fresh */
    CKCA_METHOD_LWF,            /* Li and Hoiem 2016: warm start + distillation with a_i = 1 */
    CKCA_METHOD_EWC,            /* Kirkpatrick et al. 2017, online: see ewc_lambda; needs a memory with fisher */
    CKCA_METHOD_REPLAY,         /* warm start on chunk and memory; needs a memory with pictures */
    CKCA_METHOD_COUNT
} ckca_method;

/* a_i, the weight of picture i in AdaKD; y_i is its label. GROWTH and CLASS are this project's; CONSTANT is Learning
   without Forgetting's. */
typedef enum ckca_adakd {
    CKCA_ADAKD_GROWTH = 0, /* g(n_old / n_new), the same for all pictures: n_old pictures are behind the teacher (see
                              teacher_pictures), n_new are in the chunk; g(r) = 0.3 r. All of the loss is
                              divided by the same where g is large for the number of SGD steps, see ckca__growth */
    CKCA_ADAKD_CONSTANT,   /* 1 */
    CKCA_ADAKD_CLASS,      /* the teacher's top-1 accuracy on the chunk's pictures of class y_i, 0 to 1 */
    CKCA_ADAKD_COUNT
} ckca_adakd;

/* d(f_i, ...) in FeatReg. This project's forms. */
typedef enum ckca_featreg {
    CKCA_FEATREG_CENTROID = 0, /* 1 - cos(f_i, mu[y_i]), mu[k]: the mean feature of class k over all chunks so far,
                                  carried in the checkpoint; 0 for a class without a mean. Only for networks with up
                                  to CKCA_CENTROIDS_MAX values in mu (classes x features) */
    CKCA_FEATREG_STAGES,       /* COSINE on the output map of every stage, averaged over stages */
    CKCA_FEATREG_COSINE,       /* 1 - cos(f_i, fo_i) */
    CKCA_FEATREG_COUNT
} ckca_featreg;

#define CKCA_CENTROIDS_MAX (1 << 23) /* 32 MiB; 45 MB of text in a checkpoint */

typedef struct ckca_progress {
    int update;                      /* the current update: 1 is the first */
    int epoch, epochs;               /* the current epoch, 0 to epochs - 1 */
    int batch, batches;              /* SGD steps done in this epoch, of how many */
    float lr;                        /* of this SGD step */
    double loss, kd, feat, accuracy; /* means over this epoch so far; kd and feat before w_kd and w_feat */
    double seconds, seconds_left;    /* since the call; estimated to its end */
    double w_kd;                     /* the weight of AdaKD in this update: GROWTH's, or the descriptor's */
    double waiting;                  /* fraction of seconds that training waited for pictures from disk, 0 to 1 */
} ckca_progress;

/* What is kept of the chunks that are gone: a fixed number of pictures, the Fisher information of the weights, or both.
   It lives in a file beside the checkpoint and never grows. See ckca_memory_create. */
typedef struct ckca_memory ckca_memory;

typedef struct ckca_score {
    int count;         /* pictures */
    double top1, top5; /* fractions, 0 to 1 */
    double loss;       /* mean cross-entropy */
} ckca_score;

/* What the held-out pictures say about an update. "By more than chance": p is at most keep_better (0.25 if it is off) */
typedef enum ckca_verdict {
    CKCA_VERDICT_UNTESTED = 0, /* no pictures were held out */
    CKCA_VERDICT_BETTER,       /* the new network is right on more of them, by more than chance */
    CKCA_VERDICT_UNDECIDED,    /* a tie, or too few pictures to tell */
    CKCA_VERDICT_WORSE,        /* the old network is right on more of them, by more than chance */
    CKCA_VERDICT_COUNT
} ckca_verdict;

typedef struct ckca_update_desc {
    ckca_method method;
    /* the method's terms: loss = cross-entropy + w_kd AdaKD + w_feat FeatReg, see THE METHOD. CKCA_OFF switches a term
       off */
    ckca_adakd adakd;
    ckca_featreg featreg;
    float w_kd;            /* 0 to 1e6; 0: 1 (CLASS: 2, since its a_i are below 1) */
    float w_feat;          /* 0 to 1e6; 0: 1, but off if CENTROID finds more than CKCA_CENTROIDS_MAX values in mu or a
                              teacher with another number of features, or STAGES no matching stages */
    float temperature;     /* T, up to 1e6; 0: 2 */
    float shrink, perturb; /* of SHRINK_PERTURB: 0 to 1, 0 to 1e6; 0: 0.4 and 0.1 */
    float ewc_lambda;      /* of EWC: cross-entropy + ewc_lambda / 2 sum_j F_j (w_j - w_old_j)^2, of which all is in the
                              reported loss. w_old: the weights before the update. F: the sum of the Fisher information of
                              all chunks in the memory (Schwarz et al. 2018 with gamma = 1). 0 to 1e9; 0: 1 */
    /* NULL: none. Else a memory of this model. Its pictures join the chunk, whatever the method: an epoch visits every
       picture of both once, in one random order, so on average a share M / (M + N) of each batch is the memory's; they
       take part in all terms of the loss, and in the report. After the update the memory has taken in the chunk, as
       ckca_memory_fill would; after a failure it is as before */
    ckca_memory *memory;
    /* NULL: the model before the update. Else any model of the same context, input and number of classes; it is copied,
       not changed */
    const ckca_model *teacher;
    int teacher_pictures; /* GROWTH's n_old, up to 1e9: distinct pictures that the teacher has learnt from. 0: as its
                             checkpoint says (ckca_model_info.pictures), at most 1e9; if that is not known, as if by
                             another program, as many as data has */
    /* Pictures without labels, for AdaKD, or NULL; an update without AdaKD leaves them out. Of the context, height,
       width and channels of data; their labels and classes are not read. With the n pictures of an SGD step goes a
       batch of n of these, in a shuffled order of their own that starts again when all had their turn; AdaKD's mean
       over them, with a_i = g for GROWTH and 1 for CONSTANT and CLASS, is added to its mean over the others. A step
       then takes the memory of 2 batch pictures (ckca_model_bytes), and about twice the time */
    const ckca_data *unlabelled;
    /* the training */
    int epochs, batch;                       /* up to 1e6; 0: 40 and 64. batch is at most the number of pictures */
    float lr;                                /* the peak; 0: 0.1 */
    ckca_schedule schedule;                  /* after the warm-up */
    float warmup_epochs;                     /* lr rises linearly from near 0; 0: 1. CKCA_OFF: none */
    float step_epochs;                       /* CKCA_SCHEDULE_STEP: epochs between drops of lr; 0: a third of epochs */
    float step_factor;                       /* CKCA_SCHEDULE_STEP: 0 to 1; 0: 0.1 */
    float momentum, weight_decay, clip_norm; /* as in ckca_sgd_desc */
    int no_nesterov;                         /* 1: momentum without Nesterov */
    float label_smoothing;                   /* 0 to 1; 0: none */
    ckca_augment augment;
    uint64_t seed; /* of order, augmentation and hold-out (and of the fresh weights of SCRATCH and SHRINK_PERTURB) */
    /* budgets, see BUDGETS */
    float seconds;   /* of the call, up to 1e9; epochs (with warmup_epochs, step_epochs) shrinks to fit. 0: no limit */
    float memory_mb; /* of the call, in 1e6 bytes, up to 1e9; batch shrinks to fit. 0: no limit */
    /* the test of the result, see NEVER WORSE */
    float holdout;     /* fraction of data kept out of training, up to 0.9, see ckca_holdout. 0: 0.2, but none in a
                          model's first update, with SCRATCH, or if it came to fewer than 10 pictures (20 with
                          patience). CKCA_OFF: none */
    float keep_better; /* the model stays the old network unless the new one is right on more of the held-out pictures
                          with a p of at most this, 0 to 1 (1: any lead). 0: 0.25. CKCA_OFF: the new one is kept */
    int patience;      /* epochs, up to 1e6: training ends after so many without a better one, and the new network is
                          that of the best epoch. Half of the held-out pictures choose it, the others test it. 0: off */
    /* NULL, or held-out pictures of your own instead of a fraction of data, none of which is in data */
    const ckca_data *holdout_data;
    /* files and reports */
    const char *state;   /* path of a training state; NULL: none. Written every state_seconds and at the end, removed by
                            the model's next ckca_save. If the file exists at the start, the update resumes from it, to
                            bitwise the same weights. See KILLED RUNS */
    float state_seconds; /* 0: 30 */
    /* Called after every SGD step; non-zero stops the update (CKCA_ESTOP), with several processes on all of them. Each
       call synchronises the GPU; without a callback it is synchronised once per epoch (several processes: every step) */
    int (*progress)(const ckca_progress *progress, void *user);
    void *user; /* passed to progress */
} ckca_update_desc;

typedef struct ckca_report {
    int updates;                     /* updates of the model, including this one if it succeeded */
    int steps;                       /* SGD steps of this update */
    int epochs;                      /* of this update: desc's, or as many as its seconds had time for */
    double loss, kd, feat, accuracy; /* means over the last epoch; kd and feat before w_kd and w_feat */
    double teacher_accuracy;         /* of the teacher on the pictures trained on, 0 to 1; -1: no teacher */
    double seconds;                  /* of this call */
    double w_kd;                     /* the weight of AdaKD: GROWTH's, or the descriptor's; 0: no AdaKD */
    int best_epoch;                  /* with patience: the epoch that was chosen, from 0; else the last */
    ckca_verdict verdict;
    int kept_old;             /* 1: keep_better decided for the old network: the model is as before the call */
    ckca_score before, after; /* of the old and the new network on the held-out pictures; count 0: there were none */
    int won, lost;            /* held-out pictures that only the new, only the old network is right on */
    double p;                 /* that chance alone makes won and lost differ so: McNemar's exact test, two-sided */
    double waiting;                  /* fraction of seconds that training waited for pictures from disk, 0 to 1 */
} ckca_report;

/* One update: freezes the teacher, starts as desc->method says, trains on data and adds 1 to the model's updates. The
   first update of an untrained model uses cross-entropy alone, whatever the method (unless desc->teacher is set). After
   a failure the model is as before the call, including gradients and momentum (CKCA_ESTOP: it keeps the training so
   far, untested). Likewise, with CKCA_OK, if keep_better decides for the old network: see ckca_report.kept_old. desc
   and report may be NULL. */
CKCA_API ckca_status ckca_update(ckca_model *model, const ckca_data *data, const ckca_update_desc *desc,
                                 ckca_report *report);

/* Splits data as the holdout of ckca_update does: held gets round(fraction x count) pictures, chosen at random with every
   class in proportion (to within one picture), train the rest. At least one picture of every class stays in train, so
   held may get fewer; none is CKCA_EINVAL. A picture that data repeats is in one of them only. fraction: above 0, up to
   0.9. Both are views, which you free with ckca_data_free. */
CKCA_API ckca_status ckca_holdout(const ckca_data *data, float fraction, uint64_t seed, ckca_data **train,
                                  ckca_data **held);

/* Replaces zeros in desc by the values that ckca_update would use for this model and data, so that a program can show
   them; an update with the result is the same. An unused term becomes CKCA_OFF. On failure desc is unchanged. */
CKCA_API ckca_status ckca_update_defaults(const ckca_model *model, const ckca_data *data, ckca_update_desc *desc);

/* Evaluates the model on data with running statistics. score may be NULL. per_class: classes top-1 fractions (-1: no
   picture of the class), or NULL. A model without class names, mean or std takes them from data, as in ckca_update. */
CKCA_API ckca_status ckca_evaluate(ckca_model *model, const ckca_data *data, ckca_score *score, float *per_class);
/* Class probabilities of n pictures. pixels: n x height x width x channels bytes; out: n x classes. The model's mean
   and std must be known: given, loaded, or measured by an update. */
CKCA_API ckca_status ckca_predict(ckca_model *model, const unsigned char *pixels, int n, float *out);
/* The same for the pooled features (the head's input), to search or cluster pictures by. out: n x
   ckca_model_info.features. */
CKCA_API ckca_status ckca_features(ckca_model *model, const unsigned char *pixels, int n, float *out);
/* Sets the head from class means of the features, in one pass over data, without training; needs a picture of every
   class that it sets. first 0: the whole head, so that the class of the nearest mean gets the largest logit; the
   logits' scale is the one of least cross-entropy on data. first above 0, after ckca_add_classes: the rows of the
   classes first to classes - 1 ("imprinted weights", Qi, Brown, Lowe 2018): the direction of the class mean from the
   mean of all classes of data (of the class mean itself if data has one class), the mean length of the rows before
   first, and the bias with which the class and the strongest class before first have the same mean logit on the class's
   pictures (the centre and the bias are this project's). Counts as no update. Class names, mean and std as in
   ckca_evaluate. On failure the model is as before. */
CKCA_API ckca_status ckca_imprint(ckca_model *model, const ckca_data *data, int first);
/* Adds count classes, behind the ones there are, to a model with class names. Old logits stay as they are; each new row
   of the head is the mean of the old ones, until ckca_imprint sets it. AdaKD of the next update compares the classes
   that were there before alone (its forms TRUTH and DOUBT are refused then), and if its pictures are all of new
   classes, its cross-entropy compares the new ones alone; ckca_save does not store that. Data for
   this model must have its names (ckca_data_like). Gradients and momentum are dropped. On failure the model is as
   before. */
CKCA_API ckca_status ckca_add_classes(ckca_model *model, const char *const *names, int count);

typedef struct ckca_memory_desc {
    int pictures; /* the most it keeps: 0, or at least one per class, up to 1e7 */
    int fisher;   /* 1: it keeps the diagonal of the Fisher information, a float per parameter, for EWC */
} ckca_memory_desc;
typedef struct ckca_memory_info {
    int pictures, fisher; /* as in its descriptor */
    int count;            /* pictures that it has now */
    int updates;          /* ckca_model_info.updates of the model that it was last filled with; 0: it is empty */
} ckca_memory_info;
/* An empty memory for models with this one's network, input and classes; the model is not kept. Save it after the
   checkpoint, not before:
       ckca_update(model, chunk, &desc, NULL), ckca_save(model, "net.safetensors"), ckca_memory_save(memory, "net.memory")
   A run killed between the two leaves the new checkpoint with the old memory: if you still have the old checkpoint,
   repeat the update, to the same bits; else call ckca_memory_fill with the chunk. ckca_update refuses a memory that is
   newer than the model (CKCA_EINVAL), and one of another network, input or classes. */
CKCA_API ckca_status ckca_memory_create(const ckca_model *model, ckca_memory **memory, const ckca_memory_desc *desc);
/* Takes in a chunk that the model was trained on, at the end of ckca_update or in your own call (for a checkpoint that
   had no memory yet). A pure function of memory, model and chunk; both keep their weights and pictures.
   Pictures: every class gets the same number of places, what a class cannot fill goes to the others. Herding (Rebuffi et
   al. 2017, iCaRL, algorithm 4) fills them from the memory and the chunk: one by one, the picture that brings the mean
   of the chosen ones' features nearest to the class mean. Features are those of the model, scaled to length 1. In the
   class mean the memory's pictures stand for all earlier ones: sum of the chunk's features + (number of earlier
   pictures) x (mean of the memory's).
   Fisher: F += the chunk's, the mean over pictures of the squared gradient of -log p(y), y drawn from the model's own
   softmax, once per picture. It is estimated from whole random batches of 16 pictures in training mode (a chunk of
   fewer: one batch), which visit each picture once: 16 (gradient of the batch's mean)^2, whose expectation is the
   Fisher information since the draws are independent. */
CKCA_API ckca_status ckca_memory_fill(ckca_memory *memory, ckca_model *model, const ckca_data *chunk);
CKCA_API void ckca_memory_info_get(const ckca_memory *memory, ckca_memory_info *info); /* all zeros if memory is NULL */
/* The pictures, best choice first (see FILE FORMATS), owned by the memory until it is next filled. NULL: none. */
CKCA_API const ckca_data *ckca_memory_pictures(const ckca_memory *memory);
CKCA_API void ckca_memory_free(ckca_memory *memory);
#ifndef CKCA_NO_STDIO
/* Written and read as checkpoints are: path is always the complete old or new file, and what does not fit the model is
   refused (CKCA_ESHAPE: input, classes, parameters; CKCA_EINVAL: class names). */
CKCA_API ckca_status ckca_memory_save(ckca_memory *memory, const char *path);
CKCA_API ckca_status ckca_memory_load(const ckca_model *model, ckca_memory **memory, const char *path);
#endif
/* The same file as bytes, see ckca_save_memory and ckca_load_memory. */
CKCA_API ckca_status ckca_memory_to_bytes(ckca_memory *memory, void *out, size_t capacity, size_t *size);
CKCA_API ckca_status ckca_memory_from_bytes(const ckca_model *model, ckca_memory **memory, const void *bytes,
                                            size_t size);

/* ===================================================================================================================
   API: FILES                                                                                                  >>files

   Checkpoints.
   =================================================================================================================== */

/* What ckca_load_backbone did. The head's tensors count nowhere: if left and missing are 0, the file is of the same
   network. num_batches_tracked and momentum.* are not counted. */
typedef struct ckca_backbone {
    int taken;                              /* tensors of the model that the file has replaced */
    int left;                               /* tensors of the file without one of this name and shape in the model */
    int missing;                            /* tensors of the model that keep their values */
    char first_left[96], first_missing[96]; /* the first of each, by name and in the model's order; "": none */
} ckca_backbone;

/* ImageNet's statistics, with which torchvision's networks were trained, for ckca_model_desc.mean and std:
       static const float mean[3] = CKCA_IMAGENET_MEAN, std[3] = CKCA_IMAGENET_STD; */
#define CKCA_IMAGENET_MEAN \
    { 0.485f, 0.456f, 0.406f }
#define CKCA_IMAGENET_STD \
    { 0.229f, 0.224f, 0.225f }

#ifndef CKCA_NO_STDIO
/* Writes a checkpoint (safetensors) to path.tmp and renames it: path is always the complete old or new file. Follows a
   link to the file that it names, keeps that file's permissions, and refuses what is not a regular file (CKCA_EIO).
   Then removes the training states of the updates that led to this model. */
CKCA_API ckca_status ckca_save(ckca_model *model, const char *path);
/* Creates a model from a checkpoint of ckca_save, whose metadata holds network, classes, normalisation and number of
   updates. */
CKCA_API ckca_status ckca_load(ckca_context *ctx, ckca_model **model, const char *path);
/* Loads the weights of a finished model from any safetensors file with its names and shapes (torchvision's, say). The
   prefixes module. _orig_mod. model. backbone., and chains of them, are removed from the file's names if all names then
   match. Classes, normalisation and number of updates are loaded if present. On failure the model is unchanged. */
CKCA_API ckca_status ckca_load_weights(ckca_model *model, const char *path);
/* Loads from such a file, of this network with other classes or of a similar one, every tensor that fits by name
   (prefixes are removed one name at a time) and shape. The head, which is the layer of the logits, stays as it is, also
   where it would fit; so do class names and number of updates. mean and std are loaded if present. report may be NULL.
   CKCA_EFORMAT if nothing fits. On failure the model is unchanged. */
CKCA_API ckca_status ckca_load_backbone(ckca_model *model, const char *path, ckca_backbone *report);
#endif
/* The same files in memory. ckca_save_memory sets *size to the file's size in bytes and, unless out is NULL, writes the
   file to out, of capacity bytes; CKCA_EINVAL if they are too few. The size changes only when the model is trained or
   loaded. */
CKCA_API ckca_status ckca_save_memory(ckca_model *model, void *out, size_t capacity, size_t *size);
/* bytes[0..size) need no alignment and are not needed after the call. */
CKCA_API ckca_status ckca_load_memory(ckca_context *ctx, ckca_model **model, const void *bytes, size_t size);
CKCA_API ckca_status ckca_load_weights_memory(ckca_model *model, const void *bytes, size_t size);
CKCA_API ckca_status ckca_load_backbone_memory(ckca_model *model, const void *bytes, size_t size,
                                               ckca_backbone *report);

typedef struct ckca_onnx_desc {
    int fold_batchnorm;   /* 1: a batch norm is folded into the convolution before it: fewer nodes, but that weight is
                             not the checkpoint's any more, and has a bias */
    int normalized_input; /* 1: the input is (v / 255 - mean) / std of each byte v; 0: it is v, a float from 0 to 255,
                             and the graph normalises it (the model's mean and std must be known) */
} ckca_onnx_desc;
/* Writes the network in evaluation as an ONNX model, for ONNX Runtime and other programs: opset 13, IR version 7,
   float32. Its input "input" is N x C x H x W (ONNX's order, not this library's), its output "logits" is N x classes; N
   is free. Initialisers have the checkpoint's names, values and shapes (but C x 1 x 1 for group norms), metadata the
   checkpoint's keys ckca.version, arch, classes, step, class_names, mean and std. A file of 2 GiB or more is refused,
   since protobuf cannot hold it (CKCA_EINVAL). desc may be NULL. Files are replaced as by ckca_save; the memory form
   works like ckca_save_memory. Neither removes training states: this library does not read ONNX models back. */
#ifndef CKCA_NO_STDIO
CKCA_API ckca_status ckca_save_onnx(ckca_model *model, const char *path, const ckca_onnx_desc *desc);
#endif
CKCA_API ckca_status ckca_save_onnx_memory(ckca_model *model, const ckca_onnx_desc *desc, void *out, size_t capacity,
                                           size_t *size);

/* ===================================================================================================================
   API: ADVANCED                                                                                            >>advanced

   Memory estimates, tensors, your own networks and training loops.
   =================================================================================================================== */

/* Memory, in bytes, that a model needs at a batch size, before it is allocated. training: 1 for the training steps of
   ckca_update (which also keeps a copy of the weights, a teacher of its own at its evaluation size, and a few times the
   class means of CENTROID, 4 classes x features bytes; with unlabelled pictures ask for twice the batch), 0 for
   evaluation. ckca_forward in training needs more activations, since it keeps all of them readable. A GPU that turns out
   to lack memory for the activations of training recomputes some of them: asked again after that, this says so. */
typedef struct ckca_bytes {
    size_t parameters, gradients, momentum, activations, workspace, total;
} ckca_bytes;
CKCA_API ckca_status ckca_model_bytes(const ckca_model *model, int batch, int training, ckca_bytes *bytes);

/* Parameters and buffers by index (0 to ckca_tensor_count - 1) or name, in PyTorch's order (convolution K x C x R x S,
   linear K x D). A model that is not finished has none. The first training forward creates gradients and momentum;
   frozen layers have neither (CKCA_EINVAL). */
typedef struct ckca_tensor_info {
    const char *name;   /* owned by the model */
    int dims, shape[4]; /* 1 to 4; dims values */
    int64_t count;      /* product of shape */
    int trainable;      /* 1: a parameter; 0: running_mean, running_var */
} ckca_tensor_info;
typedef enum ckca_slot { CKCA_SLOT_VALUE = 0, CKCA_SLOT_GRADIENT, CKCA_SLOT_MOMENTUM, CKCA_SLOT_COUNT } ckca_slot;
CKCA_API int ckca_tensor_count(const ckca_model *model);
CKCA_API ckca_status ckca_tensor_info_get(const ckca_model *model, int i, ckca_tensor_info *tensor);
CKCA_API int ckca_tensor_find(const ckca_model *model, const char *name);                          /* index, or -1 */
CKCA_API ckca_status ckca_tensor_read(ckca_model *model, int i, ckca_slot slot, float *out);       /* out: count */
CKCA_API ckca_status ckca_tensor_write(ckca_model *model, int i, ckca_slot slot, const float *in); /* in: count */

/* A network of your own: create it, add nodes, finish it. Each ckca_layer_* returns its node, an input for later ones.
   On failure it returns -1 and sets ckca_error; later calls given -1 return -1, and ckca_model_finish reports the first
   failure again (the model can then only be freed). A finished model takes no more nodes. Names are copied; they prefix
   the names of the parameters ("conv1" gives "conv1.weight"). */
typedef struct ckca_conv_desc {
    int out;    /* output channels, at least 1 */
    int kernel; /* up to 255; 0: 3 */
    int stride; /* up to 255; 0: 1 */
    int pad;    /* 0 to kernel - 1 */
    int bias;   /* 1: with a bias */
    int groups; /* 0 or 1: none; else output channels j out / groups to (j + 1) out / groups - 1 see the same share of
                   the input's channels alone, as torch.nn.Conv2d's groups. Divides both; weight out x C / groups x
                   kernel x kernel */
} ckca_conv_desc;
CKCA_API ckca_status ckca_model_create(ckca_context *ctx, ckca_model **model, const ckca_model_desc *desc);
CKCA_API int ckca_layer_input(ckca_model *model);
CKCA_API int ckca_layer_conv(ckca_model *model, const char *name, int input, ckca_conv_desc desc);
CKCA_API int ckca_layer_batchnorm(ckca_model *model, const char *name, int input);
CKCA_API int ckca_layer_relu(ckca_model *model, int input);
CKCA_API int ckca_layer_add(ckca_model *model, int a, int b);
/* kernel: 1 to 15, stride: 1 to 255, pad: 0 to kernel / 2 */
CKCA_API int ckca_layer_maxpool(ckca_model *model, int input, int kernel, int stride, int pad);
/* Global: N x H x W x C to N x 1 x 1 x C. */
CKCA_API int ckca_layer_avgpool(ckca_model *model, int input);
/* Takes every stride-th pixel and adds zero channels in front and behind, up to out channels. */
CKCA_API int ckca_layer_subsample(ckca_model *model, int input, int stride, int out);
/* Flattens its input in the order H x W x C. */
CKCA_API int ckca_layer_linear(ckca_model *model, const char *name, int input, int out);
/* torch.nn.GroupNorm: normalises the channels of each picture in groups of C / groups neighbours by the group's mean
   and variance, in training and evaluation alike, then applies a weight and a bias per channel, which start at 1 and 0
   and have no weight decay. groups must divide C. */
CKCA_API int ckca_layer_groupnorm(ckca_model *model, const char *name, int input, int groups);
CKCA_API int ckca_layer_stage(ckca_model *model, int input); /* marks a map for CKCA_FEATREG_STAGES; returns input */
/* Draws the initial weights. logits is the output, a linear node (N x 1 x 1 x classes); its input is the pooled
   features. All calls below need a finished model. */
CKCA_API ckca_status ckca_model_finish(ckca_model *model, int logits);

/* A training loop of your own: forward, your loss, backward, SGD. All arrays are in host memory. */
CKCA_API ckca_status ckca_forward(ckca_model *model, const float *pictures, int n, int training); /* n x H x W x C */
/* Shape of a node's output for one picture; the model need not be finished. Any of the three pointers may be NULL. */
CKCA_API ckca_status ckca_node_shape(const ckca_model *model, int node, int *height, int *width, int *channels);
/* Output of a node in the last forward, into out: n x H x W x C. After a training forward every node can be read except
   those fused into a later one (a batch norm or add that only a ReLU reads; before the first trained layer also a
   convolution that only a batch norm reads, see ckca_freeze); after evaluation, logits and features. */
CKCA_API ckca_status ckca_node_read(ckca_model *model, int node, float *out);
/* Adds the gradients of the last training forward to those of the parameters. dlogits: n x classes; dfeatures: n x
   features, or NULL. Each forward allows one backward, which overwrites the outputs of the forward. */
CKCA_API ckca_status ckca_backward(ckca_model *model, const float *dlogits, const float *dfeatures);
CKCA_API ckca_status ckca_zero_gradients(ckca_model *model);
/* Several processes: all ranks call it between ckca_backward and ckca_sgd. Replaces the gradients on every rank by their
   sum over ranks, each times its share, 0 to 1: pictures of its part over pictures of all. */
CKCA_API ckca_status ckca_sum_gradients(ckca_model *model, float share);

typedef struct ckca_sgd_desc {
    float lr;           /* required, up to 1e6 */
    float momentum;     /* m, 0 to 1; 0: 0.9 */
    float weight_decay; /* wd, 0 to 1e6; 0: 5e-4. Not applied to normalisation layers and biases */
    int no_nesterov;    /* 1: momentum without Nesterov */
    float clip_norm;    /* scales the gradient g down to this global norm; 0: off */
} ckca_sgd_desc;
/* One SGD step, as in PyTorch: v = m v + g + wd w; w -= lr (g + wd w + m v) with Nesterov, w -= lr v without. Keeps the
   gradients: call ckca_zero_gradients before the next backward. */
CKCA_API ckca_status ckca_sgd(ckca_model *model, const ckca_sgd_desc *desc);

/* Prepares a batch for ckca_forward: augments (augment may be NULL) and normalises the pictures index[0..n) of data
   into pictures (n x H x W x C), and copies their labels to labels (n, or NULL). A model without class names, mean or
   std takes them from data. */
CKCA_API ckca_status ckca_get_batch(ckca_model *model, const ckca_data *data, const int *index, int n,
                                    const ckca_augment *augment, uint64_t seed, int epoch, float *pictures,
                                    int *labels);
/* Writes a random permutation of 0 to n - 1 to order (n), a pure function of seed and epoch. ckca_update visits the
   pictures in this order. */
CKCA_API void ckca_shuffle(uint64_t seed, int epoch, int n, int *order);

#ifdef __cplusplus
}
#endif
#endif /* CKCA_H */
#if (defined(CKCA_IMPLEMENTATION) || defined(CKCA_CUDA_IMPLEMENTATION)) && !defined(CKCA__SHARED)
#define CKCA__SHARED

/* ===================================================================================================================
   SHARED                                                                                                     >>shared

   Internals shared by every section and by ckca_cuda.cu: the context, size arithmetic that cannot overflow, random
   numbers.
   =================================================================================================================== */

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* With CKCA_STATIC, or with parts left out, some functions have no caller. The end of the file pops this. */
#ifdef __GNUC__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define CKCA__PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define CKCA__PRINTF(f, a)
#endif

/* All that CKCA_CUDA changes: ckca_cuda.cu implements the ops, which are then external, in place of HOST OPS. */
#ifdef CKCA_CUDA
enum { CKCA__DEVICE_IS_HOST = 0 };
#ifdef __cplusplus
#define CKCA__OP extern "C"
#else
#define CKCA__OP extern
#endif
#else
enum { CKCA__DEVICE_IS_HOST = 1 };
#define CKCA__HOST
#define CKCA__OP static
/* Vector kernels need GNU C's pragmas and the intrinsics of x86-64 or AArch64; elsewhere the reference kernels run. */
#if !defined(CKCA_NO_SIMD) && defined(__GNUC__) && (defined(__x86_64__) || defined(__aarch64__))
#define CKCA__SIMD
#endif
#endif

/* Marks functions that run both on the host and on a GPU. */
#ifdef __CUDACC__
#define CKCA__BOTH static __host__ __device__
#else
#define CKCA__BOTH static
#endif

#define CKCA__ALIGN 64
enum { CKCA__CLASSES_MAX = 1000000 };

struct ckca_context {
    int threads;
    struct ckca__pool *pool; /* NULL: single-threaded */
    ckca_isa isa;
    int no_winograd;
    ckca_precision precision;
    void *cuda;                 /* state of ckca_cuda.cu */
    size_t refused, free_bytes; /* the GPU's last refused allocation in bytes, and what was free then */
    void *(*alloc)(size_t bytes, void *user);
    void (*release)(void *memory, size_t bytes, void *user);
    void *user;
    ckca_status failed; /* of ckca_init: not CKCA_OK: error says why, and nothing else may be asked for */
    ckca_ranks ranks;   /* size is 1 if there is one process */
    float *exchange;    /* of ckca__ranks_gather */
    int ranks_broken;   /* 1: a callback has failed: none is called again */
    int agreed;         /* 1: all ranks know of the failure that is being returned */
    char device[64];
    char error[512];
};

#ifdef CKCA_IMPLEMENTATION
/* Stores the error message and returns status, for use as: return ckca__fail(ctx, CKCA_EINVAL, "...", ...). */
static ckca_status ckca__fail(ckca_context *ctx, ckca_status status, const char *format, ...) CKCA__PRINTF(3, 4);
/* Host memory: zeroed, 64-byte aligned; NULL if out of memory. bytes may be 0. */
static void *ckca__alloc(ckca_context *ctx, size_t bytes);
static void ckca__release(ckca_context *ctx, void *memory); /* memory may be NULL */
#endif

/* a * b and a + b that saturate at SIZE_MAX instead of wrapping (an allocation of SIZE_MAX always fails). */
static size_t ckca__mul(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }
static size_t ckca__sum(size_t a, size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }
static size_t ckca__round_up(size_t a, size_t to) { return a > SIZE_MAX - to ? SIZE_MAX : (a + to - 1) / to * to; }

/* Counter-based random numbers: pure functions of (seed, stream, index), so a draw is the same whichever thread or
   device makes it, and when. The mixing function is SplitMix64's (Steele, Lea, Flood 2014). */
enum { CKCA__STREAM_INIT = 1, CKCA__STREAM_SHUFFLE, CKCA__STREAM_AUGMENT, CKCA__STREAM_SPLIT,
       CKCA__STREAM_FISHER, CKCA__STREAM_HOLDOUT };
CKCA__BOTH uint64_t ckca__mix(uint64_t z) {
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}
CKCA__BOTH uint64_t ckca__random(uint64_t seed, uint64_t stream, uint64_t index) {
    uint64_t z = ckca__mix(seed + UINT64_C(0x9e3779b97f4a7c15));
    z = ckca__mix(z ^ (stream * UINT64_C(0xd1342543de82ef95) + 1));
    return ckca__mix(z + index * UINT64_C(0x9e3779b97f4a7c15));
}
CKCA__BOTH double ckca__uniform(uint64_t seed, uint64_t stream, uint64_t index) { /* in [0, 1) */
    return (double)(ckca__random(seed, stream, index) >> 11) * (1.0 / 9007199254740992.0);
}

/* ===================================================================================================================
   BACKEND                                                                                                   >>backend

   The interface between the library and the compute device: device memory and the ops. HOST OPS implements it on the
   CPU, ckca_cuda.cu on a GPU, with the same signatures; CKCA_CUDA chooses at compile time.

   All pointers are device memory (on the host, ordinary memory): float32, NHWC, 64-byte aligned at their start, and not
   overlapping unless stated. "accumulate" adds to the output instead of overwriting it. ws is scratch memory of at
   least the size that ckca__conv_workspace or ckca__op_workspace returns. Results do not depend on the number of
   threads.

   bf16 is 1 on a GPU only: an op's maps and their gradients (x, y, residual, dx, dy, dresidual) are then bfloat16
   behind the float pointers. Weights, statistics and everything after global pooling are always float32.
   =================================================================================================================== */

/* A training batch norm whose statistics are known: relu?((x - mean) inv_std gamma + beta). C values per array. */
typedef struct ckca__norm {
    const float *mean, *inv_std, *gamma, *beta;
    int relu;
} ckca__norm;

/* Where a training batch norm's statistics go, c values each: mean and inv_std of this batch, the running ones (which
   move, see ckca__op_batchnorm_forward). */
typedef struct ckca__statistics {
    float *mean, *inv_std, *running_mean, *running_var;
} ckca__statistics;

typedef struct ckca__conv {
    int n, h, w, c; /* input: N x H x W x C */
    int k, r, s;    /* weight: K x R x S x C */
    int stride, pad;
    int p, q;               /* output: N x P x Q x K; p = (h + 2 pad - r) / stride + 1 */
    const ckca__norm *norm; /* applied to the input while it is read, before zero padding; or NULL */
    int bf16_x, bf16;       /* bf16_x: the input is bfloat16; bf16: the output is (poolings: bf16 says so of both) */
    void *packed_weights;   /* from ckca__op_pack_weights; or NULL */
    const ckca__statistics *statistics; /* forward: also computes these of its output; NULL: none */
    int groups; /* above 1: grouped, the weight is K x R x S x C / groups; then no norm, no statistics */
} ckca__conv;

/* Input channels that each output channel sees. */
CKCA__BOTH int ckca__group_inputs(const ckca__conv *s) { return s->groups > 1 ? s->c / s->groups : s->c; }

/* Opens the device behind a new context (a failure leaves its sentence in ctx->error); closes it. */
CKCA__OP ckca_status ckca__device_init(ckca_context *ctx);
CKCA__OP void ckca__device_free(ckca_context *ctx);
/* Ops return nothing. The first failure on the GPU is kept here and reported once: CKCA_ECUDA, with its name and
   message in ckca_error. */
CKCA__OP ckca_status ckca__device_status(ckca_context *ctx);

/* Several processes: replaces x[0..count) by its sum over ranks, each times its share, behind all work so far. May run
   beside later work, which must leave x alone until ckca__device_ranks_wait. All ranks start the same sums in the same
   order. poll keeps sums going that are under way. A failure of the connection sets ctx->ranks_broken. init comes before
   the first sum. */
CKCA__OP ckca_status ckca__device_ranks_init(ckca_context *ctx);
CKCA__OP void ckca__device_ranks_sum(ckca_context *ctx, size_t count, float share, float *x);
CKCA__OP void ckca__device_ranks_poll(ckca_context *ctx);
CKCA__OP void ckca__device_ranks_wait(ckca_context *ctx);

/* A sequence of ops that repeats, with only values in device memory changing, is recorded once and then replayed:
       if (ckca__device_record(ctx, &recording)) { the ops; ckca__device_recorded(ctx, &recording); }
   *recording starts as NULL; ckca__device_forget frees it. On the host the ops run every time. */
CKCA__OP int ckca__device_record(ckca_context *ctx, void **recording);
CKCA__OP void ckca__device_recorded(ckca_context *ctx, void **recording);
CKCA__OP void ckca__device_forget(ckca_context *ctx, void **recording);

/* Device memory. ckca__device_alloc returns memory of undefined contents, or NULL if out of memory. */
CKCA__OP void *ckca__device_alloc(ckca_context *ctx, size_t bytes);
CKCA__OP void ckca__device_release(ckca_context *ctx, void *memory, size_t bytes);
CKCA__OP void ckca__device_upload(ckca_context *ctx, void *device, const void *host, size_t bytes);
CKCA__OP void ckca__device_download(ckca_context *ctx, void *host, const void *device, size_t bytes);
CKCA__OP void ckca__device_copy(ckca_context *ctx, void *to, const void *from, size_t bytes);
CKCA__OP void ckca__device_zero(ckca_context *ctx, void *device, size_t bytes);
/* Free device memory in bytes. */
CKCA__OP size_t ckca__device_free_bytes(const ckca_context *ctx);

/* A staging buffer collects one batch on the host while the device still computes the previous one: fill the memory
   that ckca__device_staging_buffer returns; ckca__device_staging_send then queues its copy to device behind all earlier
   work and returns at once. bytes: the most that one send copies. open returns NULL if out of memory, buffer returns
   NULL after a failure. */
CKCA__OP void *ckca__device_staging_open(ckca_context *ctx, size_t bytes);
CKCA__OP void *ckca__device_staging_buffer(ckca_context *ctx, void *staging);
CKCA__OP void ckca__device_staging_send(ckca_context *ctx, void *staging, void *device, size_t bytes);
CKCA__OP void ckca__device_staging_close(ckca_context *ctx, void *staging);

/* Scratch bytes for the three passes of a convolution of this shape; for any other op on rows x c values. */
CKCA__OP size_t ckca__conv_workspace(const ckca_context *ctx, const ckca__conv *s);
/* 1 if a convolution of this shape (forward pass, weight gradient), or a max pooling, can normalise its input. */
CKCA__OP int ckca__may_norm(const ckca_context *ctx, const ckca__conv *s);
/* 1: the forward pass takes statistics, where the convolution has them, as ckca__op_batchnorm_forward would. */
CKCA__OP int ckca__may_take_statistics(const ckca_context *ctx, const ckca__conv *s);
CKCA__OP size_t ckca__op_workspace(const ckca_context *ctx, size_t rows, int c);

/* Weights in the layout that a GPU's convolutions read (rounded, and transposed for the input gradient). One call packs
   the weights of count convolutions, each into its packed_weights of ckca__packed_bytes bytes (0: w is read in place).
   A convolution whose packed_weights is NULL packs them itself. */
CKCA__OP size_t ckca__packed_bytes(const ckca_context *ctx, const ckca__conv *s, int backward);
CKCA__OP void ckca__op_pack_weights(ckca_context *ctx, int count, const ckca__conv *s, const float *const *w,
                                    int backward);

/* y (N x P x Q x K) = relu?(conv(x, w) + bias + residual). bias (K) and residual (like y) may be NULL. */
CKCA__OP void ckca__op_conv_forward(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w,
                                    const float *bias, const float *residual, int relu, float *y, void *ws);
/* dx (N x H x W x C) from dy (N x P x Q x K). Never called where the output alone is bfloat16: the first layer's input,
   the pictures, needs no gradient. */
CKCA__OP void ckca__op_conv_backward_data(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w,
                                          float *dx, int accumulate, void *ws);
/* Adds to dw (K x R x S x C) and, unless it is NULL, to dbias (K). */
CKCA__OP void ckca__op_conv_backward_weight(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy,
                                            float *dw, float *dbias, void *ws);
/* y (N x K) = x (N x D) w^T (K x D) + bias. The backward passes have the same shapes. bias may be NULL; so may dw, and
   dbias with it: they are not wanted. */
CKCA__OP void ckca__op_linear_forward(ckca_context *ctx, int n, int d, int k, const float *x, const float *w,
                                      const float *bias, float *y, void *ws);
CKCA__OP void ckca__op_linear_backward(ckca_context *ctx, int n, int d, int k, const float *x, const float *w,
                                       const float *dy, float *dx, int accumulate, float *dw, float *dbias, void *ws);

/* Training batch norm over rows x c (rows = N H W). Saves mean and inv_std (c each) for the backward pass and moves the
   running statistics with momentum 0.1 (unbiased variance). y = relu?((x - mean) inv_std gamma + beta + residual)
   unless y is NULL; residual_norm, if not NULL, is applied to the residual first. */
CKCA__OP void ckca__op_batchnorm_forward(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                         const float *gamma, const float *beta, float *running_mean, float *running_var,
                                         const float *residual, const ckca__norm *residual_norm, int relu, float *y,
                                         float *mean, float *inv_std, void *ws);
/* Recomputes the y of the last forward pass, bit for bit, from x and the saved statistics. y may be residual. */
CKCA__OP void ckca__op_batchnorm_recompute(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                           const ckca__norm *norm, const float *residual,
                                           const ckca__norm *residual_norm, float *y);
/* dgamma NULL: the statistics are constants, of a frozen layer; then dx = dy gamma inv_std and nothing else is
   computed. dy is the gradient of y; with relu it passes only where y > 0. Without a residual y may be NULL: x then
   tells whether y > 0. Writes dx; writes or accumulates dresidual unless it is NULL; adds to dgamma and dbeta. dx may
   be dy, or dx may be x while dresidual is dy. */
CKCA__OP void ckca__op_batchnorm_backward(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                          const float *y, const float *dy, const ckca__norm *norm, float *dx,
                                          float *dresidual, int accumulate_residual, float *dgamma, float *dbeta,
                                          void *ws);
/* Batch norm in evaluation, with running statistics. */
CKCA__OP void ckca__op_batchnorm_eval(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                      const float *gamma, const float *beta, const float *running_mean,
                                      const float *running_var, const float *residual, int relu, float *y);
/* Folds a batch norm in evaluation into the convolution before it, per output channel (k of them, per weights each):
   w_out = w gamma / std, bias_out = beta + (bias - running_mean) gamma / std. bias may be NULL. */
CKCA__OP void ckca__op_fold(ckca_context *ctx, int k, size_t per, const float *w, const float *bias, const float *gamma,
                            const float *beta, const float *running_mean, const float *running_var, float *w_out,
                            float *bias_out);

/* Group norm of n pictures of area = H W pixels: y = (x - mean) inv_std gamma + beta, mean and inv_std (biased variance,
   eps 1e-5) over the area and the c / groups channels of a group. statistics holds them for the backward pass: n x groups
   means, then as many inv_std; NULL in evaluation. */
CKCA__OP void ckca__op_groupnorm_forward(ckca_context *ctx, int bf16, int n, int area, int c, int groups,
                                         const float *x, const float *gamma, const float *beta, float *y,
                                         float *statistics);
/* Writes dx or adds to it (NULL: it is not wanted); adds to dgamma and dbeta (c each; or NULL). ws: 2 n c floats. */
CKCA__OP void ckca__op_groupnorm_backward(ckca_context *ctx, int bf16, int n, int area, int c, int groups,
                                          const float *x, const float *gamma, const float *statistics, const float *dy,
                                          float *dx, int accumulate, float *dgamma, float *dbeta, void *ws);

/* y = relu?(a + b). b may be NULL. */
CKCA__OP void ckca__op_add(ckca_context *ctx, int bf16, size_t count, const float *a, const float *b, int relu,
                           float *y);
/* dx (+)= dy where y > 0 (everywhere if y is NULL). */
CKCA__OP void ckca__op_add_backward(ckca_context *ctx, int bf16, size_t count, const float *y, const float *dy,
                                    float *dx, int accumulate);
/* s: r = s = kernel size, k = c. at, NULL in evaluation, stores which kernel position had each output's maximum (the
   first of equals). */
CKCA__OP void ckca__op_maxpool_forward(ckca_context *ctx, const ckca__conv *s, const float *x, float *y,
                                       unsigned char *at);
CKCA__OP void ckca__op_maxpool_backward(ckca_context *ctx, const ckca__conv *s, const float *dy,
                                        const unsigned char *at, float *dx, int accumulate);
/* Mean over area = H W. x is n x area x c; bf16 applies to x and dx only. */
CKCA__OP void ckca__op_avgpool_forward(ckca_context *ctx, int bf16, int n, int area, int c, const float *x, float *y);
CKCA__OP void ckca__op_avgpool_backward(ckca_context *ctx, int bf16, int n, int area, int c, const float *dy, float *dx,
                                        int accumulate);
/* The parameter-free shortcut (option A of He et al. 2016): every stride-th pixel, with (k - c) / 2 zero channels
   before and after. */
CKCA__OP void ckca__op_subsample_forward(ckca_context *ctx, const ckca__conv *s, const float *x, float *y);
CKCA__OP void ckca__op_subsample_backward(ckca_context *ctx, const ckca__conv *s, const float *dy, float *dx,
                                          int accumulate);

/* Losses. Each writes or accumulates scale times its gradient with respect to the student, and writes its unscaled
   value per picture to loss[n]; the term is their mean.
   Softmax cross-entropy with PyTorch's label smoothing, target (1 - e) onehot + e / K. hit[i] has bit 0 set if the arg
   max (the lowest index of equals) is the label, bit 1 if the label is in the top 5. dlogits (n x k) may be NULL. */
CKCA__OP void ckca__op_cross_entropy(ckca_context *ctx, int n, int k, const float *logits, const int *labels,
                                     float smoothing, float scale, float *dlogits, float *loss, int *hit);
CKCA__OP void ckca__op_softmax(ckca_context *ctx, int n, int k, const float *logits, float *p);
/* AdaKD with a_i = class_weight[labels[i]] (k values), or 1 if class_weight is NULL (labels may be NULL then). Adds to
   dlogits. */
CKCA__OP void ckca__op_adakd(ckca_context *ctx, int n, int k, const float *student_logits, const float *teacher_logits,
                             const int *labels, const float *class_weight, float temperature, float scale,
                             float *dlogits, float *loss);
/* FeatReg on n rows of d values: 1 - cos(student, teacher). STAGES calls it once per stage with d = H W C; CENTROID's
   teacher_features are the class means of the n labels. Writes or accumulates dfeatures. A row of zeros has no gradient;
   the loss is 1 then, or of_zero if the teacher's row is zero. bf16 applies to the student's features and dfeatures,
   bf16_teacher to the teacher's. */
CKCA__OP void ckca__op_featreg(ckca_context *ctx, int bf16, int bf16_teacher, int n, int d,
                               const float *student_features, const float *teacher_features, float scale,
                               float *dfeatures, int accumulate, float of_zero, float *loss);
/* *sum += the sum of values[0..n), in double precision. */
CKCA__OP void ckca__op_sum(ckca_context *ctx, int n, const float *values, double *sum);
/* *sum += the number of correct predictions in hit[0..n) (bit 0). */
CKCA__OP void ckca__op_count(ckca_context *ctx, int n, const int *hit, double *sum);

/* out[i] = rows[index[i]], d values each: the batch's rows of the teacher's stored outputs. */
CKCA__OP void ckca__op_gather(ckca_context *ctx, int n, int d, const float *rows, const int *index, float *out);

/* One SGD step on count values (see ckca_sgd); weight decay applies to the first decayed of them. *lr and *gscale are
   on the device; the learning rate is *lr factor, g is multiplied by *gscale (NULL: 1). */
CKCA__OP void ckca__op_sgd(ckca_context *ctx, size_t count, size_t decayed, float *w, const float *g, float *v,
                           const float *lr, float factor, float momentum, float weight_decay, int nesterov,
                           const float *gscale);
/* *gscale = min(1, clip / ||g||) over count values, as torch.nn.utils.clip_grad_norm_ (eps 1e-6). */
CKCA__OP void ckca__op_clip(ckca_context *ctx, size_t count, const float *g, float clip, float *gscale, void *ws);
/* w = shrink w + perturb fresh. */
CKCA__OP void ckca__op_shrink_perturb(ckca_context *ctx, size_t count, float *w, const float *fresh, float shrink,
                                      float perturb);
/* EWC's penalty, lambda / 2 sum_j fisher_j (w_j - old_j)^2 over count values: adds its gradient to g, and scale times its
   value to *sum. */
CKCA__OP void ckca__op_ewc(ckca_context *ctx, size_t count, const float *w, const float *old, const float *fisher,
                           float lambda, float *g, double scale, double *sum, void *ws);
/* fisher += scale g^2, value by value. */
CKCA__OP void ckca__op_add_squares(ckca_context *ctx, size_t count, const float *g, float scale, float *fisher);

/* Converts pictures index[0..n) of a store of h x w x c bytes each to floats (n x h x w x c): augments them as a pure
   function of (seed, *epoch, index), then computes (v / 255 - mean) / std per channel. gathered: pixels holds only
   these n pictures, in this order; index may then be ~index (see ckca__augment_framing). Outside a picture augmentation
   reads black (0). augment may be NULL, and epoch with it. augment, mean and std (c values) are host memory. */
CKCA__OP void ckca__op_batch(ckca_context *ctx, int n, int h, int w, int c, const unsigned char *pixels, int gathered,
                             const int *index, const ckca_augment *augment, uint64_t seed, const int *epoch,
                             const float *mean, const float *std, float *out);

/* ---- augmentation: random draws, identical on every device ---- */

/* The augmentation drawn for one picture: crop, mirroring and colour factors. */
typedef struct ckca__framing {
    int top, left, height, width; /* may reach outside the picture (black) if it has the picture's size */
    int flip;
    float brightness, contrast, saturation; /* factors */
} ckca__framing;

enum {
    CKCA__AUGMENT_FLIP,
    CKCA__AUGMENT_TOP,
    CKCA__AUGMENT_LEFT,
    CKCA__AUGMENT_BRIGHTNESS,
    CKCA__AUGMENT_CONTRAST,
    CKCA__AUGMENT_SATURATION,
    CKCA__AUGMENT_CROP
};

CKCA__BOTH double ckca__augment_uniform(uint64_t picture_seed, int draw) {
    return ckca__uniform(picture_seed, CKCA__STREAM_AUGMENT, (uint64_t)draw);
}
CKCA__BOTH int ckca__augment_int(uint64_t picture_seed, int draw, int below) {
    int i = (int)(ckca__augment_uniform(picture_seed, draw) * below);
    return i < below ? i : below - 1;
}

/* As torchvision's RandomResizedCrop.get_params: ten attempts at an area in crop_min..1 and an aspect ratio in 3/4..4/3
   (log-uniform); if none fits, the largest centred rectangle of allowed aspect ratio. */
CKCA__BOTH void ckca__augment_crop(uint64_t seed, int h, int w, double crop_min, ckca__framing *f) {
    const double low = 3.0 / 4, high = 4.0 / 3;
    int attempt;
    if (!(crop_min > 0)) crop_min = 0.25;
    if (crop_min > 1) crop_min = 1;
    for (attempt = 0; attempt < 10; attempt++) {
        int draw = CKCA__AUGMENT_CROP + 2 * attempt;
        double area = (double)h * w * (crop_min + (1 - crop_min) * ckca__augment_uniform(seed, draw));
        double aspect = exp(log(low) + (log(high) - log(low)) * ckca__augment_uniform(seed, draw + 1));
        f->width = (int)floor(sqrt(area * aspect) + 0.5);
        f->height = (int)floor(sqrt(area / aspect) + 0.5);
        if (f->width < 1 || f->width > w || f->height < 1 || f->height > h) continue;
        f->top = ckca__augment_int(seed, CKCA__AUGMENT_TOP, h - f->height + 1);
        f->left = ckca__augment_int(seed, CKCA__AUGMENT_LEFT, w - f->width + 1);
        return;
    }
    f->height = h;
    f->width = w;
    if (w < low * h)
        f->height = (int)floor(w / low + 0.5);
    else if (w > high * h)
        f->width = (int)floor(h * high + 0.5);
    f->top = (h - f->height) / 2;
    f->left = (w - f->width) / 2;
}

/* index: of the picture in its store, or ~index if resized_crop was applied before (see STREAMING in the library). */
CKCA__BOTH void ckca__augment_framing(const ckca_augment *augment, uint64_t seed, int epoch, int index, int h, int w,
                                      ckca__framing *f) {
    memset(f, 0, sizeof *f);
    f->height = h;
    f->width = w;
    f->brightness = f->contrast = f->saturation = 1;
    if (!augment) return;
    seed = ckca__random(seed, CKCA__STREAM_AUGMENT,
                        (uint64_t)(uint32_t)epoch << 32 | (uint32_t)(index < 0 ? ~index : index));
    if (augment->resized_crop) {
        if (index >= 0) ckca__augment_crop(seed, h, w, augment->crop_min, f);
    } else if (augment->pad > 0) {
        int y = augment->pad < h ? augment->pad : h, x = augment->pad < w ? augment->pad : w;
        f->top = ckca__augment_int(seed, CKCA__AUGMENT_TOP, 2 * y + 1) - y;
        f->left = ckca__augment_int(seed, CKCA__AUGMENT_LEFT, 2 * x + 1) - x;
    }
    f->flip = augment->flip && ckca__augment_uniform(seed, CKCA__AUGMENT_FLIP) < 0.5;
    if (augment->jitter > 0) {
        double low = augment->jitter < 1 ? 1 - augment->jitter : 0, range = 1 + augment->jitter - low;
        f->brightness = (float)(low + range * ckca__augment_uniform(seed, CKCA__AUGMENT_BRIGHTNESS));
        f->contrast = (float)(low + range * ckca__augment_uniform(seed, CKCA__AUGMENT_CONTRAST));
        f->saturation = (float)(low + range * ckca__augment_uniform(seed, CKCA__AUGMENT_SATURATION));
    }
}

CKCA__BOTH float ckca__augment_clamp(float v) { return v < 0 ? 0 : v > 255 ? 255 : v; }
/* Luma of ITU-R BT.601, like torchvision's rgb_to_grayscale. */
CKCA__BOTH float ckca__augment_grey(int c, const float *v) {
    return c == 3 ? 0.2989f * v[0] + 0.587f * v[1] + 0.114f * v[2] : v[0];
}
#endif /* CKCA__SHARED */

#if defined(CKCA_IMPLEMENTATION) && !defined(CKCA__LIBRARY)
#define CKCA__LIBRARY

/* ===================================================================================================================
   CORE                                                                                                         >>core

   Context, errors, memory, clock, names, small files.
   =================================================================================================================== */

/* In THREADS: */
static int ckca__pool_threads(int threads);
static size_t ckca__pool_bytes(int threads);
static void ckca__pool_init(ckca_context *ctx, void *memory);
static void ckca__pool_free(ckca_context *ctx);
static void ckca__lock(ckca_context *ctx);
static void ckca__unlock(ckca_context *ctx);

/* In VECTOR KERNELS: */
static ckca_isa ckca__best_isa(void);
static int ckca__isa_supported(ckca_isa isa);
static const char *ckca__isa_name(ckca_isa isa);

/* ---- errors ---- */

static ckca_status ckca__fail(ckca_context *ctx, ckca_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(ctx->error, sizeof ctx->error, format, args);
    va_end(args);
    if (status == CKCA_ENOMEM && ctx->refused) { /* set only by ckca_cuda.cu */
        size_t length = strlen(ctx->error);
        snprintf(ctx->error + length, sizeof ctx->error - length,
                 " (the GPU could not allocate %.1f MB, %.1f MB are free)", (double)ctx->refused * 1e-6,
                 (double)ctx->free_bytes * 1e-6);
    }
    ctx->refused = 0;
    return status;
}

CKCA_API const char *ckca_error(const ckca_context *ctx) {
    return ctx ? ctx->error : "no context: ckca_init was not called, or ran out of memory";
}

/* A numeric field of a descriptor and its range. */
typedef struct ckca__bound {
    const char *name;
    double value, least, most;
    int off; /* 1: CKCA_OFF is allowed too */
} ckca__bound;

/* 1 if one of count values is out of its range or NaN; text then names the field, its value and its range. */
static int ckca__out_of_bounds(const ckca__bound *b, int count, char *text, size_t capacity) {
    for (; count > 0; count--, b++) {
        if ((b->value >= b->least && b->value <= b->most) || (b->off && b->value == (double)CKCA_OFF)) continue;
        snprintf(text, capacity, "%s is %.*g, must be %.10g to %.10g%s", b->name,
                 fabs(b->value) < 1e10 && b->value == floor(b->value) ? 10 : 7, /* digits of an int, or of a float */
                 b->value == b->value ? b->value : fabs(b->value), b->least, b->most, b->off ? ", or CKCA_OFF" : "");
        return 1;
    }
    return 0;
}

static ckca_status ckca__check_bounds(ckca_context *ctx, const char *call, const ckca__bound *b, int count) {
    char text[160];
    if (!ckca__out_of_bounds(b, count, text, sizeof text)) return CKCA_OK;
    return ckca__fail(ctx, CKCA_EINVAL, "%s: %s", call, text);
}

static ckca_status ckca__null(ckca_context *ctx, const char *call, const char *argument) {
    return ckca__fail(ctx, CKCA_EINVAL, "%s: %s is NULL", call, argument);
}

/* 1 if ctx is not NULL and ckca_init succeeded. */
static int ckca__usable(const ckca_context *ctx) { return ctx && !ctx->failed; }

CKCA_API const char *ckca_status_name(ckca_status status) {
    static const char *const name[] = {
        "ok",         "bad argument", "shapes do not match", "out of memory", "input or output failed", "bad file",
        "not finite", "stopped",      "CUDA failed",         "ranks failed"};
    return (unsigned)status < sizeof name / sizeof *name ? name[status] : "unknown status";
}

/* ---- context ---- */

/* In RANKS: */
static ckca_status ckca__ranks_init(ckca_context *ctx, ckca_status status);
static ckca_status ckca__ranks_agree(ckca_context *ctx, const char *call, ckca_status status);

CKCA_API ckca_status ckca_init(ckca_context **out, const ckca_desc *desc) {
    ckca__bound bounds[6] = {{"threads", 0, 0, 4096, 0},    {"isa", 0, 0, CKCA_ISA_COUNT - 1, 0},
                             {"no_winograd", 0, 0, 1, 0},   {"precision", 0, 0, CKCA_PRECISION_COUNT - 1, 0},
                             {"ranks.size", 1, 1, 4096, 0}, {"ranks.rank", 0, 0, 0, 0}};
    ckca_desc none;
    ckca_context *ctx;
    char reason[160] = "";
    size_t bytes;
    int threads;
    if (!out) return CKCA_EINVAL;
    *out = NULL;
    memset(&none, 0, sizeof none);
    if (!desc) desc = &none;
    bounds[0].value = desc->threads;
    bounds[1].value = (int)desc->isa;
    bounds[2].value = desc->no_winograd;
    bounds[3].value = (int)desc->precision;
    if (desc->ranks) {
        bounds[4].value = desc->ranks->size;
        bounds[5].value = desc->ranks->rank;
        bounds[5].most = desc->ranks->size - 1;
    }
    if (!desc->alloc != !desc->release)
        snprintf(reason, sizeof reason, "%s is NULL: set both alloc and release, or neither",
                 desc->alloc ? "release" : "alloc");
    else if (!ckca__out_of_bounds(bounds, 6, reason, sizeof reason)) {
        if (desc->ranks && (!desc->ranks->sum_start || !desc->ranks->sum_wait || !desc->ranks->broadcast))
            snprintf(reason, sizeof reason, "ranks.%s is NULL",
                     !desc->ranks->sum_start  ? "sum_start"
                     : !desc->ranks->sum_wait ? "sum_wait"
                                              : "broadcast");
        else if (desc->isa != CKCA_ISA_BEST && !ckca__isa_supported(desc->isa))
            snprintf(reason, sizeof reason, "isa is %s, but the best that this processor and build support is %s",
                     ckca__isa_name(desc->isa), ckca__isa_name(ckca__best_isa()));
        else if (CKCA__DEVICE_IS_HOST && desc->precision)
            snprintf(reason, sizeof reason, "precision is %s, which needs a GPU: this is built without CKCA_CUDA",
                     desc->precision == CKCA_PRECISION_TF32 ? "CKCA_PRECISION_TF32" : "CKCA_PRECISION_BF16");
    }
    if (*reason) desc = &none; /* the context only holds the error: use none of the invalid fields */
    threads = *reason ? 1 : ckca__pool_threads(desc->threads);
    bytes = sizeof *ctx + ckca__pool_bytes(threads); /* the pool follows the context */
    ctx = (ckca_context *)(desc->alloc ? desc->alloc(bytes, desc->user) : malloc(bytes));
    if (!ctx) return CKCA_ENOMEM;
    memset(ctx, 0, bytes);
    *out = ctx;
    ctx->threads = threads;
    ctx->ranks.size = 1;
    if (*reason) return ctx->failed = ckca__fail(ctx, CKCA_EINVAL, "ckca_init: %s", reason);
    ckca__pool_init(ctx, ctx + 1);
    ctx->alloc = desc->alloc;
    ctx->release = desc->release;
    ctx->user = desc->user;
    ctx->isa = desc->isa ? desc->isa : ckca__best_isa();
    ctx->no_winograd = desc->no_winograd;
    ctx->precision = desc->precision;
    snprintf(ctx->device, sizeof ctx->device, "host %s x%d", ckca__isa_name(ctx->isa), ctx->threads);
    if (desc->ranks) ctx->ranks = *desc->ranks;
    return ctx->failed = ckca__ranks_init(ctx, ckca__device_init(ctx));
}

CKCA_API void ckca_context_free(ckca_context *ctx) {
    if (!ctx) return;
    ckca__device_free(ctx);
    ckca__release(ctx, ctx->exchange);
    ckca__pool_free(ctx);
    if (ctx->release)
        ctx->release(ctx, sizeof *ctx + ckca__pool_bytes(ctx->threads), ctx->user);
    else
        free(ctx);
}

CKCA_API const char *ckca_device(const ckca_context *ctx) { return ctx ? ctx->device : ""; }

CKCA_API const char *ckca_version(void) { return CKCA_VERSION; }

CKCA_API size_t ckca_struct_size(const char *name) {
    /* clang-format off */
#define CKCA__TYPE(type) #type, sizeof(type)
    static const struct {
        const char *name;
        size_t size;
    } types[] = {
        {CKCA__TYPE(ckca_desc)},
        {CKCA__TYPE(ckca_ranks)},
        {CKCA__TYPE(ckca_data_desc)},
        {CKCA__TYPE(ckca_data_info)},
        {CKCA__TYPE(ckca_array)},
        {CKCA__TYPE(ckca_split_desc)},
        {CKCA__TYPE(ckca_model_desc)},
        {CKCA__TYPE(ckca_model_info)},
        {CKCA__TYPE(ckca_augment)},
        {CKCA__TYPE(ckca_progress)},
        {CKCA__TYPE(ckca_update_desc)},
        {CKCA__TYPE(ckca_report)},
        {CKCA__TYPE(ckca_memory_desc)},
        {CKCA__TYPE(ckca_memory_info)},
        {CKCA__TYPE(ckca_backbone)},
        {CKCA__TYPE(ckca_score)},
        {CKCA__TYPE(ckca_onnx_desc)},
        {CKCA__TYPE(ckca_bytes)},
        {CKCA__TYPE(ckca_tensor_info)},
        {CKCA__TYPE(ckca_conv_desc)},
        {CKCA__TYPE(ckca_sgd_desc)},
    };
#undef CKCA__TYPE
    /* clang-format on */
    size_t i;
    for (i = 0; name && i < sizeof types / sizeof *types; i++)
        if (!strcmp(types[i].name, name)) return types[i].size;
    return 0;
}

CKCA_API ckca_status ckca_agree(ckca_context *ctx, ckca_status status) {
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    ctx->agreed = 0;
    return ckca__ranks_agree(ctx, "ckca_agree", status);
}

/* ---- memory ---- */

#if defined(__linux__) && !defined(CKCA_NO_STDIO)
#include <sys/mman.h>
#endif

/* Zeroed memory. Large blocks are aligned to 2 MiB and marked for huge pages: page faults of 4 KiB cost more than the
   arithmetic on a page. Size and offset of the block are stored in front of the memory. */
static void *ckca__alloc(ckca_context *ctx, size_t bytes) {
    size_t align = bytes >= ((size_t)4 << 20) && !ctx->alloc ? (size_t)2 << 20 : CKCA__ALIGN;
    size_t size = ckca__sum(bytes, align + sizeof(size_t) * 2);
    char *block, *memory;
    if (size > SIZE_MAX / 2) return NULL;
    block = (char *)(ctx->alloc ? ctx->alloc(size, ctx->user) : malloc(size));
    if (!block) return NULL;
    memory = (char *)ckca__round_up((size_t)(uintptr_t)block + sizeof(size_t) * 2, align);
    ((size_t *)(void *)memory)[-1] = (size_t)(memory - block);
    ((size_t *)(void *)memory)[-2] = size;
#if defined(MADV_HUGEPAGE)
    if (align > CKCA__ALIGN) madvise(memory, bytes / align * align, MADV_HUGEPAGE);
#endif
    memset(memory, 0, bytes);
    return memory;
}

static void ckca__release(ckca_context *ctx, void *memory) {
    char *block;
    size_t size;
    if (!memory) return;
    block = (char *)memory - ((size_t *)memory)[-1];
    size = ((size_t *)memory)[-2];
    if (ctx->release)
        ctx->release(block, size, ctx->user);
    else
        free(block);
}

/* Makes sure that a growing array of count items has capacity for one more. 0: no memory. */
static int ckca__grow(ckca_context *ctx, void **items, size_t count, size_t *capacity, size_t item_bytes) {
    size_t more = *capacity ? ckca__mul(*capacity, 2) : 16;
    void *grown;
    if (count < *capacity) return 1;
    grown = ckca__alloc(ctx, ckca__mul(more, item_bytes));
    if (!grown) return 0;
    if (count) memcpy(grown, *items, count * item_bytes);
    ckca__release(ctx, *items);
    *items = grown;
    *capacity = more;
    return 1;
}

/* ---- clock ---- */

#include <time.h>
#if defined(__unix__) || defined(__APPLE__)
#include <sys/time.h>
#endif

static double ckca__seconds(void) {
#if defined(__unix__) || defined(__APPLE__)
#ifdef CLOCK_MONOTONIC /* undefined in strict C99 */
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now) == 0) return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
#endif
    {
        struct timeval wall;
        gettimeofday(&wall, NULL);
        return (double)wall.tv_sec + 1e-6 * (double)wall.tv_usec;
    }
#else
    return (double)clock() / CLOCKS_PER_SEC; /* no threads here: processor time is close to wall time */
#endif
}

/* ---- names, paths and small files ---- */

#include <errno.h>

static void ckca__free_names(ckca_context *ctx, char **names, int n) {
    int i;
    if (!names) return;
    for (i = 0; i < n; i++) ckca__release(ctx, names[i]);
    ckca__release(ctx, names);
}

/* Copies n strings, or "0", "1", ... if names is NULL. Returns NULL without memory. */
static char **ckca__copy_names(ckca_context *ctx, const char *const *names, int n) {
    char **copy = (char **)ckca__alloc(ctx, ckca__mul((size_t)n, sizeof *copy)), number[16];
    int i;
    if (!copy) return NULL;
    for (i = 0; i < n; i++) {
        const char *name = number;
        if (names)
            name = names[i];
        else
            snprintf(number, sizeof number, "%d", i);
        copy[i] = (char *)ckca__alloc(ctx, strlen(name) + 1);
        if (!copy[i]) {
            ckca__free_names(ctx, copy, i);
            return NULL;
        }
        memcpy(copy[i], name, strlen(name) + 1);
    }
    return copy;
}

/* The end of a path, its most useful part: the text of an error is limited. */
static const char *ckca__tail(const char *path) {
    size_t length = strlen(path);
    return length > 240 ? path + (length - 240) : path;
}

static char *ckca__path(ckca_context *ctx, const char *dir, const char *name) {
    size_t size = ckca__sum(strlen(dir), ckca__sum(strlen(name), 2));
    char *path = (char *)ckca__alloc(ctx, size);
    if (path) snprintf(path, size, "%s/%s", dir, name);
    return path;
}

#ifndef CKCA_NO_STDIO
#if defined(__unix__) || defined(__APPLE__)
#define CKCA__POSIX
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
/* Opens a regular file of at most max bytes for reading; *size is its size in bytes. */
static ckca_status ckca__open_file(ckca_context *ctx, const char *path, size_t max, FILE **file, size_t *size) {
    long length = -1;
#ifdef CKCA__POSIX
    struct stat about; /* opening a pipe would block, and opening a directory would succeed */
    if (stat(path, &about) == 0 && !S_ISREG(about.st_mode))
        return ckca__fail(ctx, CKCA_EIO, "%s: not a regular file", ckca__tail(path));
#endif
    *file = fopen(path, "rb");
    if (!*file) return ckca__fail(ctx, CKCA_EIO, "%s: cannot be opened: %s", ckca__tail(path), strerror(errno));
    if (fseek(*file, 0, SEEK_END) == 0) length = ftell(*file);
    if (length < 0 || fseek(*file, 0, SEEK_SET) != 0) {
        ckca__fail(ctx, CKCA_EIO, "%s: cannot determine its size: %s", ckca__tail(path), strerror(errno));
        fclose(*file);
        return CKCA_EIO;
    }
    if ((unsigned long)length > max) {
        fclose(*file);
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: has %ld bytes, the limit is %.0f", ckca__tail(path), length,
                          (double)max);
    }
    *size = (size_t)length;
    return CKCA_OK;
}
/* Reads a file of at most max bytes. The caller releases *bytes, which has a zero byte after its *size bytes. */
static ckca_status ckca__read_file(ckca_context *ctx, const char *path, size_t max, unsigned char **bytes,
                                   size_t *size) {
    FILE *file;
    size_t got;
    ckca_status status = ckca__open_file(ctx, path, max, &file, size);
    *bytes = NULL;
    if (status) return status;
    ckca__lock(ctx); /* the tasks of ckca__decode_all call this */
    *bytes = (unsigned char *)ckca__alloc(ctx, ckca__sum(*size, 1));
    ckca__unlock(ctx);
    if (!*bytes) {
        fclose(file);
        return ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory for its %.0f bytes", ckca__tail(path), (double)*size);
    }
    got = fread(*bytes, 1, *size, file);
    fclose(file);
    if (got == *size) return CKCA_OK;
    ckca__lock(ctx);
    ckca__release(ctx, *bytes);
    ckca__unlock(ctx);
    *bytes = NULL;
    return ckca__fail(ctx, CKCA_EIO, "%s: reading stopped after %.0f of %.0f bytes", ckca__tail(path), (double)got,
                      (double)*size);
}
static int ckca__file_exists(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file) fclose(file);
    return file != NULL;
}
#endif /* CKCA_NO_STDIO */

/* ===================================================================================================================
   DATA                                                                                                         >>data

   Pictures and labels: stores and views, resizing, readers, splitting.

   A store holds the decoded pictures of a set as bytes, and their labels. A ckca_data is a view of a store: a list of
   indices into it. Splits and subsets thus share the pixels. The store counts its views; freeing the last one frees it.
   =================================================================================================================== */

/* Where a picture of a folder or list is. */
typedef struct ckca__source {
    const char *path;                           /* of its file; NULL: no file, the picture is decoded */
    const unsigned char *bytes;                 /* its file in memory; NULL: on disk */
    const unsigned char *raw;                   /* decoded, in a store without pixels of its own; or NULL */
    size_t size;                                /* of the file, in bytes */
    int64_t time;                               /* of the file's last change, in seconds */
    int short_side, as_stored, skip_unreadable; /* of ckca_data_desc */
    int resized;                                /* 1: its decoded form is not the whole picture, pixel by pixel */
    int unreadable;                             /* 1: counted in the store's unreadable */
} ckca__source;

typedef struct ckca__store {
    ckca_context *ctx;
    int refs; /* references: views, and the call that is creating the store */
    int count, height, width, channels, classes;
    unsigned char *pixels;    /* count x height x width x channels; NULL: read when needed, see source */
    ckca__source *source;     /* count; NULL: no picture has a file */
    int resized;              /* 1: some source is */
    char *paths;              /* what source[].path points into */
    unsigned char *held;      /* what source[].bytes and source[].raw point into */
    int short_side;           /* of ckca_data_desc */
    unsigned char *resident;  /* the same on the device, from the first batch on; on the host: pixels itself */
    int streams;              /* 1: too large for the device: each batch is uploaded separately */
    int *labels;              /* count, each 0 to classes - 1 */
    char **class_names;       /* classes */
    int left_out, unreadable; /* see ckca_data_info */
    char *first_unreadable;
} ckca__store;

static size_t ckca__picture_bytes(const ckca__store *s) {
    return (size_t)s->height * (size_t)s->width * (size_t)s->channels;
}
static size_t ckca__store_bytes(const ckca__store *s) { return (size_t)s->count * ckca__picture_bytes(s); }

struct ckca_data {
    ckca__store *store;
    int count;
    int *index; /* count: picture i is picture index[i] of the store */
};

/* In THREADS: */
static void ckca__parallel(ckca_context *ctx, int tasks, void (*work)(void *job, int task, int thread), void *job);
/* In SAFETENSORS: */
static size_t ckca__utf8_flaw(const unsigned char *text, size_t size);
/* Below, for models too: */
static ckca_status ckca__check_names(ckca_context *ctx, const char *call, const char *const *names, int n);

enum { CKCA__MAX_SIDE = 16384 }; /* of a picture, in pixels */
#ifndef CKCA__MAX_PIXELS
/* Of a picture file: 8192 x 8192, so that a small file cannot claim much memory. */
#define CKCA__MAX_PIXELS ((int64_t)1 << 26)
#endif
enum { CKCA__MAX_DEFAULT_PIXELS = 1 << 22 }; /* of a first picture that gives the set its size */

/* Of a folder or list; ckca_data_desc.budget_mb if that is 0. */
enum { CKCA__BUDGET_MB = 4096 };

/* Keeps the context's error as the message of the first unreadable picture, unless there is one. 0: no memory. */
static int ckca__keep_message(ckca__store *store) {
    if (store->first_unreadable) return 1;
    store->first_unreadable = (char *)ckca__alloc(store->ctx, strlen(store->ctx->error) + 1);
    if (store->first_unreadable) memcpy(store->first_unreadable, store->ctx->error, strlen(store->ctx->error) + 1);
    return store->first_unreadable != NULL;
}

static void ckca__store_release(ckca__store *store) {
    if (!store || --store->refs) return;
    ckca__free_names(store->ctx, store->class_names, store->classes);
    ckca__release(store->ctx, store->first_unreadable);
    ckca__release(store->ctx, store->labels);
    ckca__release(store->ctx, store->source);
    ckca__release(store->ctx, store->paths);
    ckca__release(store->ctx, store->held);
    if (!CKCA__DEVICE_IS_HOST) ckca__device_release(store->ctx, store->resident, ckca__store_bytes(store));
    ckca__release(store->ctx, store->pixels);
    ckca__release(store->ctx, store);
}

/* desc's short_side must leave enough for the crop. */
static ckca_status ckca__check_short_side(ckca_context *ctx, const ckca_data_desc *desc, int height, int width) {
    if (!desc->short_side || (desc->short_side >= height && desc->short_side >= width)) return CKCA_OK;
    return ckca__fail(ctx, CKCA_EINVAL, "desc: short_side is %d, too short to crop %d x %d from it", desc->short_side,
                      height, width);
}

/* Creates a store of count pictures, zeroed; decoded 0: without pixels. desc's height, width and channels replace those
   given unless they are 0. names: classes (NULL: "0", "1", ...), copied. The caller holds the only reference. */
static ckca_status ckca__store_new(ckca_context *ctx, ckca__store **out, size_t count, int height, int width,
                                   int channels, int classes, const char *const *names, const ckca_data_desc *desc,
                                   int decoded) {
    ckca__store *store;
    size_t bytes;
    height = desc->height ? desc->height : height;
    width = desc->width ? desc->width : width;
    channels = desc->channels ? desc->channels : channels;
    bytes = decoded ? ckca__mul(ckca__mul((size_t)height * (size_t)width, (size_t)channels), count) : 0;
    if (ckca__check_short_side(ctx, desc, height, width)) return CKCA_EINVAL;
    if (count == 0 || count > INT_MAX)
        return ckca__fail(ctx, CKCA_EINVAL, "a data set must have 1 to %d pictures, this one has %.0f", INT_MAX,
                          (double)count);
    store = (ckca__store *)ckca__alloc(ctx, sizeof *store);
    if (!store) return ckca__fail(ctx, CKCA_ENOMEM, "no memory for a data set");
    store->ctx = ctx;
    store->refs = 1;
    store->count = (int)count;
    store->height = height;
    store->width = width;
    store->channels = channels;
    store->classes = classes;
    store->short_side = desc->short_side;
    store->pixels = decoded ? (unsigned char *)ckca__alloc(ctx, bytes) : NULL;
    store->labels = (int *)ckca__alloc(ctx, ckca__mul(count, sizeof *store->labels));
    store->class_names = ckca__copy_names(ctx, names, classes);
    if ((decoded && !store->pixels) || !store->labels || !store->class_names) {
        ckca__store_release(store);
        return ckca__fail(ctx, CKCA_ENOMEM, "no memory for %.0f pictures of %d x %d x %d (%.0f bytes)", (double)count,
                          height, width, channels, (double)bytes);
    }
    *out = store;
    return CKCA_OK;
}
static ckca_status ckca__store_create(ckca_context *ctx, ckca__store **out, size_t count, int height, int width,
                                      int channels, int classes, const char *const *names, const ckca_data_desc *desc) {
    return ckca__store_new(ctx, out, count, height, width, channels, classes, names, desc, 1);
}

/* Picture i of a store if it is held decoded, else NULL. */
static const unsigned char *ckca__raw(const ckca__store *store, int i) {
    if (store->pixels) return store->pixels + (size_t)i * ckca__picture_bytes(store);
    return store->source[i].raw;
}

/* Creates a view of the pictures index[0..n) of the store, or of 0 to n - 1 if index is NULL. */
static ckca_status ckca__view(ckca_data **out, ckca__store *store, const int *index, int n) {
    ckca_context *ctx = store->ctx;
    ckca_data *data = (ckca_data *)ckca__alloc(ctx, sizeof *data);
    int i;
    if (data) data->index = (int *)ckca__alloc(ctx, ckca__mul((size_t)n, sizeof *data->index));
    if (!data || !data->index) {
        ckca__release(ctx, data);
        return ckca__fail(ctx, CKCA_ENOMEM, "no memory for a view of %d pictures", n);
    }
    data->store = store;
    data->count = n;
    for (i = 0; i < n; i++) data->index[i] = index ? index[i] : i;
    store->refs++;
    *out = data;
    return CKCA_OK;
}

CKCA_API void ckca_data_free(ckca_data *data) {
    ckca_context *ctx;
    if (!data) return;
    ctx = data->store->ctx;
    ckca__store_release(data->store);
    ckca__release(ctx, data->index);
    ckca__release(ctx, data);
}

CKCA_API void ckca_data_info_get(const ckca_data *data, ckca_data_info *info) {
    int i;
    if (!info) return;
    memset(info, 0, sizeof *info);
    if (!data) return;
    info->count = data->count;
    info->height = data->store->height;
    info->width = data->store->width;
    info->channels = data->store->channels;
    info->classes = data->store->classes;
    info->class_names = (const char *const *)data->store->class_names;
    info->storage = CKCA_STORAGE_DECODED;
    for (i = 0; !data->store->pixels && i < data->count; i++) {
        const ckca__source *source = &data->store->source[data->index[i]];
        ckca_storage storage = source->bytes ? CKCA_STORAGE_COMPRESSED
                               : source->raw ? CKCA_STORAGE_DECODED
                                             : CKCA_STORAGE_STREAM;
        if (storage > info->storage) info->storage = storage;
    }
    info->left_out = data->store->left_out;
    info->unreadable = data->store->unreadable;
    info->first_unreadable = data->store->first_unreadable;
}

CKCA_API int ckca_label(const ckca_data *data, int i) {
    return !data || i < 0 || i >= data->count ? -1 : data->store->labels[data->index[i]];
}

CKCA_API const unsigned char *ckca_pixels(const ckca_data *data, int i) {
    if (!data || i < 0 || i >= data->count) return NULL;
    return ckca__raw(data->store, data->index[i]);
}

/* A name for messages: bytes that are not printable ASCII as \x and two digits. Cut to capacity. */
static void ckca__escape(const char *name, char *out, size_t capacity) {
    size_t i, at = 0;
    for (i = 0; name[i] && at + 5 < capacity; i++) {
        unsigned char c = (unsigned char)name[i];
        at += (size_t)snprintf(out + at, capacity - at, c < 127 && c >= 32 ? "%c" : "\\x%02x", c);
    }
    out[at] = 0;
}
/* Compares pointers into a list of names: by name, then by place. */
static int ckca__compare_names(const void *a, const void *b) {
    const char *const *first = *(const char *const *const *)a, *const *second = *(const char *const *const *)b;
    int order = strcmp(*first, *second);
    return order ? order : (first > second) - (first < second);
}
/* Checks the n class names of a descriptor (NULL: none): UTF-8, as checkpoints are, and no two the same. */
static ckca_status ckca__check_names(ckca_context *ctx, const char *call, const char *const *names, int n) {
    const char *const **sorted;
    char escaped[160];
    ckca_status status = CKCA_OK;
    int i;
    if (!names) return CKCA_OK;
    for (i = 0; i < n; i++) {
        if (!names[i]) return ckca__fail(ctx, CKCA_EINVAL, "%s: class_names[%d] is NULL", call, i);
        if (!names[i][ckca__utf8_flaw((const unsigned char *)names[i], strlen(names[i]))]) continue;
        ckca__escape(names[i], escaped, sizeof escaped);
        return ckca__fail(ctx, CKCA_EINVAL, "%s: class_names[%d] is \"%s\", which is not UTF-8", call, i, escaped);
    }
    sorted = (const char *const **)ckca__alloc(ctx, ckca__mul((size_t)n, sizeof *sorted));
    if (!sorted) return ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory to compare %d class names", call, n);
    for (i = 0; i < n; i++) sorted[i] = names + i;
    qsort(sorted, (size_t)n, sizeof *sorted, ckca__compare_names);
    for (i = 1; i < n && strcmp(*sorted[i - 1], *sorted[i]) != 0; i++) {
    }
    if (i < n)
        status = ckca__fail(ctx, CKCA_EINVAL, "%s: class_names[%d] and [%d] are both \"%.100s\"", call,
                            (int)(sorted[i - 1] - names), (int)(sorted[i] - names), *sorted[i]);
    ckca__release(ctx, sorted);
    return status;
}

/* Checks a descriptor and copies it to *out; NULL: all zeros. */
static ckca_status ckca__data_desc(ckca_context *ctx, const ckca_data_desc *desc, ckca_data_desc *out) {
    ckca__bound bounds[8] = {{"height", 0, 0, CKCA__MAX_SIDE, 0},
                             {"width", 0, 0, CKCA__MAX_SIDE, 0},
                             {"classes", 0, 0, CKCA__CLASSES_MAX, 0},
                             {"as_stored", 0, 0, 1, 0},
                             {"skip_unreadable", 0, 0, 1, 0},
                             {"short_side", 0, 0, CKCA__MAX_SIDE, 0},
                             {"storage", 0, 0, CKCA_STORAGE_COUNT - 1, 0},
                             {"budget_mb", 0, 0, 1 << 24, 0}};
    ckca_status status;
    memset(out, 0, sizeof *out);
    if (!desc) return CKCA_OK;
    *out = *desc;
    bounds[0].value = desc->height;
    bounds[1].value = desc->width;
    bounds[2].value = desc->classes;
    bounds[3].value = desc->as_stored;
    bounds[4].value = desc->skip_unreadable;
    bounds[5].value = desc->short_side;
    bounds[6].value = (int)desc->storage;
    bounds[7].value = desc->budget_mb;
    if ((status = ckca__check_bounds(ctx, "desc", bounds, 8))) return status;
    if (desc->channels != 0 && desc->channels != 1 && desc->channels != 3)
        return ckca__fail(ctx, CKCA_EINVAL, "desc: channels is %d, must be 1, 3, or 0 (as in the data)",
                          desc->channels);
    if (desc->class_names && desc->classes == 0)
        return ckca__fail(ctx, CKCA_EINVAL, "desc: classes is 0, but class_names is set: classes is their number");
    return ckca__check_names(ctx, "desc", desc->class_names, desc->classes);
}

/* --- Resizing ----------------------------------------------------------------------------------------------------- */

/* Weights of a triangle filter that resizes the `length` values of a row from `from` on to `full` values, of which `out`
   from number `skip` on are wanted: out[x] is the sum of weight[x * taps + i] * in[first[x] + i] over i < used[x], in
   units of 2^-22. Only in[low..high) is read. first and used: out; weight: out x taps. The filter is as wide as the
   reduction, so that every input contributes (antialiasing). Order of operations and rounding are those of Pillow
   (src/libImaging/Resample.c, precompute_coeffs). */
static void ckca__taps(int low, int high, double from, double length, int full, int skip, int out, int taps, int *first,
                       int *used, int *weight) {
    double scale = length / full, support = scale > 1.0 ? scale : 1.0;
    int x, i;
    for (x = 0; x < out; x++) {
        double center = from + (x + skip + 0.5) * scale, total = 0.0;
        int begin = (int)(center - support + 0.5), end = (int)(center + support + 0.5), pass;
        if (begin < low) begin = low;
        if (end > high) end = high;
        first[x] = begin;
        used[x] = end - begin;
        for (pass = 0; pass < 2; pass++) { /* first the total, then the normalised weights */
            for (i = 0; i < used[x]; i++) {
                double w = 1.0 - fabs((i + begin - center + 0.5) / support);
                if (w < 0.0) w = 0.0;
                if (pass == 0)
                    total += w;
                else
                    weight[x * taps + i] = (int)(w / total * 4194304.0 + 0.5);
            }
        }
    }
}

/* Converts a pixel of c channels (grey, grey and alpha, RGB, RGB and alpha) to grey (m = 1) or RGB (m = 3). Alpha is
   dropped; grey has the weights of ITU-R BT.601 in units of 2^-16, as in Pillow. */
static void ckca__pixel(const unsigned char *in, int c, unsigned char *out, int m) {
    int i;
    if (c < 3)
        for (i = 0; i < m; i++) out[i] = in[0];
    else if (m == 3)
        for (i = 0; i < 3; i++) out[i] = in[i];
    else
        out[0] = (unsigned char)((in[0] * 19595 + in[1] * 38470 + in[2] * 7471 + 32768) >> 16);
}

/* What a picture is made into, and how. */
typedef struct ckca__target {
    int height, width, channels, short_side, as_stored;
    const ckca_augment *augment; /* resized_crop is applied to the full-size picture; NULL: none */
    uint64_t seed;               /* of augment */
    int epoch, index;            /* likewise */
    int resized;                 /* out: 1: not the whole picture, pixel by pixel */
    int cropped;                 /* out: 1: resized_crop was applied */
} ckca__target;

/* One side of a resized part of a picture: the part's first value and length, the values of the picture that may be
   read, the part's length when resized, and which of those are wanted: `out` from number `skip` on. */
typedef struct ckca__span {
    double from, length;
    int low, high, full, skip, out;
} ckca__span;

static void ckca__span_set(ckca__span *span, double from, double length, int low, int high, int full, int out) {
    int more = full - out;
    span->from = from;
    span->length = length;
    span->low = low;
    span->high = high;
    span->full = full;
    span->skip = more / 2 + (more & 1 && more / 2 & 1); /* the centre; half a pixel as Python's round, to even */
    span->out = out;
}

/* Which part of an upright picture of h x w the target shows. */
static void ckca__aim(ckca__target *t, int h, int w, ckca__span *y, ckca__span *x) {
    const int shorter = h < w ? h : w;
    t->cropped = 0;
    t->resized = h != t->height || w != t->width || (t->short_side && t->short_side != shorter);
    if (t->augment && t->augment->resized_crop && t->resized) {
        ckca__framing f;
        ckca__augment_framing(t->augment, t->seed, t->epoch, t->index, h, w, &f);
        ckca__span_set(y, f.top, f.height, f.top, f.top + f.height, t->height, t->height);
        ckca__span_set(x, f.left, f.width, f.left, f.left + f.width, t->width, t->width);
        t->cropped = 1;
    } else if (t->short_side) {
        ckca__span_set(y, 0, h, 0, h, (int)((int64_t)t->short_side * h / shorter), t->height);
        ckca__span_set(x, 0, w, 0, w, (int)((int64_t)t->short_side * w / shorter), t->width);
    } else { /* the centre crop of the new aspect ratio */
        int64_t in_aspect = (int64_t)w * t->height, out_aspect = (int64_t)t->width * h;
        double box_width = in_aspect > out_aspect ? (double)t->width / t->height * h : w;
        double box_height = in_aspect < out_aspect ? w / ((double)t->width / t->height) : h;
        ckca__span_set(y, (h - box_height) * 0.5, box_height, 0, h, t->height, t->height);
        ckca__span_set(x, (w - box_width) * 0.5, box_width, 0, w, t->width, t->width);
    }
}

/* Resizes the part (ys, xs) of a picture of h x w x c (c: 1 to 4) into ys->out x xs->out x channels (1 or 3), as
   Pillow's resize with Image.BILINEAR and box. row_stride and pixel_stride are in bytes and may be negative. 0: no
   memory. */
static int ckca__resize_strided(ckca_context *ctx, const unsigned char *in, ptrdiff_t row_stride,
                                ptrdiff_t pixel_stride, int h, int w, int c, const ckca__span *ys, const ckca__span *xs,
                                unsigned char *out, int channels) {
    int m = c < 3 || channels == 1 ? 1 : 3, x, y, k, i, x_taps, y_taps, x_end, y_end;
    const int height = ys->out, width = xs->out;
    int *x_first, *x_used, *x_weight, *y_first, *y_used, *y_weight;
    unsigned char *row, *wide; /* w x m: one row; y_end - y_first[0] rows of width x m: all at the new width */
    size_t old_w = (size_t)w, old_h = (size_t)(ys->high - ys->low), new_w = (size_t)width, new_h = (size_t)height;
    size_t n = (size_t)m, x_span, y_span; /* x_taps, y_taps */
    void *scratch = NULL;
    const int plain_y = ys->length == height && ys->full == height && (double)ys->low == ys->from;
    const int plain_x = xs->length == width && xs->full == width && (double)xs->low == xs->from;
    if (plain_y && plain_x) { /* nothing to resize */
        in += ys->low * row_stride + xs->low * pixel_stride;
        if (c == channels && pixel_stride == c) {
            for (y = 0; y < height; y++)
                memcpy(out + (size_t)y * (size_t)width * (size_t)c, in + y * row_stride, (size_t)width * (size_t)c);
            return 1;
        }
        for (y = 0; y < height; y++)
            for (x = 0; x < width; x++, out += channels)
                ckca__pixel(in + y * row_stride + x * pixel_stride, c, out, channels);
        return 1;
    }
    (void)h;
    x_taps = (int)ceil(xs->length / xs->full > 1.0 ? xs->length / xs->full : 1.0) * 2 + 1;
    y_taps = (int)ceil(ys->length / ys->full > 1.0 ? ys->length / ys->full : 1.0) * 2 + 1;
    x_span = (size_t)x_taps;
    y_span = (size_t)y_taps;
    ckca__lock(ctx);
    scratch =
        ckca__alloc(ctx, sizeof(int) * (new_w * (x_span + 2) + new_h * (y_span + 2)) + old_w * n + old_h * new_w * n);
    ckca__unlock(ctx);
    if (!scratch) return 0;
    x_first = (int *)scratch;
    x_used = x_first + width;
    x_weight = x_used + width;
    y_first = x_weight + new_w * x_span;
    y_used = y_first + height;
    y_weight = y_used + height;
    row = (unsigned char *)(y_weight + new_h * y_span);
    wide = row + old_w * n;
    ckca__taps(xs->low, xs->high, xs->from, xs->length, xs->full, xs->skip, width, x_taps, x_first, x_used, x_weight);
    ckca__taps(ys->low, ys->high, ys->from, ys->length, ys->full, ys->skip, height, y_taps, y_first, y_used, y_weight);
    x_end = x_first[width - 1] + x_used[width - 1];
    y_end = y_first[height - 1] + y_used[height - 1];
    for (y = y_first[0]; y < y_end; y++) {
        unsigned char *to = wide + (size_t)(y - y_first[0]) * new_w * n;
        const unsigned char *from = row;
        if (c == m && pixel_stride == c)
            from = in + y * row_stride;
        else
            for (x = x_first[0]; x < x_end; x++)
                ckca__pixel(in + y * row_stride + x * pixel_stride, c, row + (size_t)x * n, m);
        for (x = 0; x < width; x++) { /* 2^21 is 0.5, for rounding. The weights sum to 1, so 255 stays 255 */
            const int *weight = x_weight + (size_t)x * x_span;
            const unsigned char *p = from + (size_t)x_first[x] * n;
            int sum[3] = {1 << 21, 1 << 21, 1 << 21};
            if (m == 3)
                for (i = 0; i < x_used[x]; i++, p += 3) {
                    sum[0] += weight[i] * p[0];
                    sum[1] += weight[i] * p[1];
                    sum[2] += weight[i] * p[2];
                }
            else
                for (i = 0; i < x_used[x]; i++) sum[0] += weight[i] * p[i];
            for (k = 0; k < m; k++) *to++ = (unsigned char)(sum[k] >> 22 > 255 ? 255 : sum[k] >> 22);
        }
    }
    for (y = 0; y < height; y++) {
        const unsigned char *from = wide + (size_t)(y_first[y] - y_first[0]) * new_w * n;
        const int *weight = y_weight + (size_t)y * y_span;
        for (x = 0; x < width; x++, out += channels) {
            for (k = 0; k < m; k++) {
                const unsigned char *p = from + (size_t)x * n + (size_t)k;
                int sum = 1 << 21;
                for (i = 0; i < y_used[y]; i++, p += new_w * n) sum += weight[i] * *p;
                sum >>= 22;
                out[k] = (unsigned char)(sum > 255 ? 255 : sum);
            }
            if (m < channels) ckca__pixel(out, 1, out, 3);
        }
    }
    ckca__lock(ctx);
    ckca__release(ctx, scratch);
    ckca__unlock(ctx);
    return 1;
}

/* The same for a picture of h x w x c in memory, with EXIF orientation 1 to 8 applied (1: unchanged; 5 to 8
   transpose). ys and xs are of the upright picture. */
static int ckca__resize(ckca_context *ctx, const unsigned char *in, int h, int w, int c, int orientation,
                        const ckca__span *ys, const ckca__span *xs, unsigned char *out, int channels) {
    ptrdiff_t row = (ptrdiff_t)w * c, pixel = c;
    if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) { /* bottom to top */
        in += row * (h - 1);
        row = -row;
    }
    if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) { /* right to left */
        in += pixel * (w - 1);
        pixel = -pixel;
    }
    if (orientation > 4) return ckca__resize_strided(ctx, in, pixel, row, w, h, c, ys, xs, out, channels);
    return ckca__resize_strided(ctx, in, row, pixel, h, w, c, ys, xs, out, channels);
}

/* Resizes a whole picture to cover height x width and crops the centre, as Pillow's ImageOps.fit(picture, (width,
   height), Image.BILINEAR). */
static int ckca__fit(ckca_context *ctx, const unsigned char *in, int h, int w, int c, int orientation,
                     unsigned char *out, int height, int width, int channels) {
    ckca__target target;
    ckca__span ys, xs;
    memset(&target, 0, sizeof target);
    target.height = height;
    target.width = width;
    ckca__aim(&target, orientation > 4 ? w : h, orientation > 4 ? h : w, &ys, &xs);
    return ckca__resize(ctx, in, h, w, c, orientation, &ys, &xs, out, channels);
}

typedef struct ckca__fit_job {
    ckca_context *ctx;
    const unsigned char *pixels;
    size_t stride;
    int h, w, c;
    ckca__store *store;
    int first, failed;
} ckca__fit_job;

static void ckca__fit_one(void *job, int i, int thread) {
    ckca__fit_job *a = (ckca__fit_job *)job;
    const ckca__store *store = a->store;
    ckca__target target;
    ckca__span ys, xs;
    (void)thread;
    memset(&target, 0, sizeof target);
    target.height = store->height;
    target.width = store->width;
    target.short_side = store->short_side;
    ckca__aim(&target, a->h, a->w, &ys, &xs);
    if (ckca__resize(a->ctx, a->pixels + (size_t)i * a->stride, a->h, a->w, a->c, 1, &ys, &xs,
                     store->pixels + (size_t)(a->first + i) * ckca__picture_bytes(store), store->channels))
        return;
    ckca__lock(a->ctx);
    a->failed = 1;
    ckca__unlock(a->ctx);
}

/* Resizes count pictures of h x w x c, stride bytes apart, into the store, from picture first on. */
static ckca_status ckca__fit_all(ckca_context *ctx, const unsigned char *pixels, size_t stride, int count, int h, int w,
                                 int c, ckca__store *store, int first) {
    ckca__fit_job job = {ctx, pixels, stride, h, w, c, store, first, 0};
    ckca__parallel(ctx, count, ckca__fit_one, &job);
    if (job.failed)
        return ckca__fail(ctx, CKCA_ENOMEM, "no memory to resize pictures of %d x %d x %d to %d x %d", h, w, c,
                          store->height, store->width);
    return CKCA_OK;
}

/* --- Arrays ------------------------------------------------------------------------------------------------------- */

CKCA_API ckca_status ckca_open_array(ckca_context *ctx, ckca_data **data, const ckca_array *array,
                                     const ckca_data_desc *desc_or_null) {
    ckca_data_desc desc;
    ckca__store *store;
    ckca_status status;
    ckca__bound bounds[4] = {{"count", 0, 1, INT_MAX, 0},
                             {"height", 0, 1, CKCA__MAX_SIDE, 0},
                             {"width", 0, 1, CKCA__MAX_SIDE, 0},
                             {"classes", 0, 1, CKCA__CLASSES_MAX, 0}};
    size_t bytes;
    int i;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!data || !array) return ckca__null(ctx, "ckca_open_array", !data ? "data" : "array");
    if (!array->pixels || !array->labels)
        return ckca__null(ctx, "ckca_open_array", !array->pixels ? "array's pixels" : "array's labels");
    status = ckca__data_desc(ctx, desc_or_null, &desc);
    if (status) return status;
    bounds[0].value = array->count;
    bounds[1].value = array->height;
    bounds[2].value = array->width;
    bounds[3].value = array->classes;
    if ((status = ckca__check_bounds(ctx, "array", bounds, 4))) return status;
    if (array->channels != 1 && array->channels != 3)
        return ckca__fail(ctx, CKCA_EINVAL, "array: channels is %d, must be 1 or 3", array->channels);
    if ((status = ckca__check_names(ctx, "array", array->class_names, array->classes))) return status;
    for (i = 0; i < array->count; i++)
        if (array->labels[i] < 0 || array->labels[i] >= array->classes)
            return ckca__fail(ctx, CKCA_EINVAL, "array: labels[%d] is %d, there are %d classes", i, array->labels[i],
                              array->classes);
    status = ckca__store_create(ctx, &store, (size_t)array->count, array->height, array->width, array->channels,
                                array->classes, array->class_names, &desc);
    if (status) return status;
    memcpy(store->labels, array->labels, (size_t)array->count * sizeof *array->labels);
    bytes = (size_t)array->height * (size_t)array->width * (size_t)array->channels;
    status =
        ckca__fit_all(ctx, array->pixels, bytes, array->count, array->height, array->width, array->channels, store, 0);
    if (!status) status = ckca__view(data, store, NULL, store->count);
    ckca__store_release(store);
    return status;
}

#ifndef CKCA_NO_STDIO
/* --- CIFAR's and MNIST's formats ---------------------------------------------------------------------------------- */
/* Index of a name in a list, or -1. */
static int ckca__find_name(const char *const *names, int n, const char *name) {
    int i;
    for (i = 0; i < n; i++)
        if (!strcmp(names[i], name)) return i;
    return -1;
}
static ckca_status ckca__check_cifar(ckca_context *ctx, const char *path, size_t size, size_t record) {
    if (size && size % record == 0) return CKCA_OK;
    return ckca__fail(ctx, CKCA_EFORMAT, "%s: %.0f bytes, not a multiple of the record size %.0f (truncated?)",
                      ckca__tail(path), (double)size, (double)record);
}
/* Parses a CIFAR file into the store, from picture first on. A record has label_bytes bytes, the last of them the
   label, and 3 planes of 32 x 32 bytes: red, green, blue. label maps the file's classes to the store's (-1: not a class
   of the store, an error). Overwrites bytes. */
static ckca_status ckca__parse_cifar(ckca_context *ctx, const char *path, unsigned char *bytes, size_t size,
                                     int label_bytes, int classes, const int *label, ckca__store *store, int first) {
    unsigned char planes[3072];
    size_t record = (size_t)label_bytes + sizeof planes, i;
    int k, x;
    ckca_status status = ckca__check_cifar(ctx, path, size, record);
    if (status) return status;
    for (i = 0; i < size / record; i++) {
        unsigned char *at = bytes + i * record;
        if (at[label_bytes - 1] >= classes)
            return ckca__fail(ctx, CKCA_EFORMAT, "%s: picture %.0f has label %d, there are %d classes",
                              ckca__tail(path), (double)i, at[label_bytes - 1], classes);
        if (label[at[label_bytes - 1]] < 0)
            return ckca__fail(ctx, CKCA_EINVAL, "%s: picture %.0f is of class %d, not one of the %d requested",
                              ckca__tail(path), (double)i, at[label_bytes - 1], store->classes);
        store->labels[(size_t)first + i] = label[at[label_bytes - 1]];
        memcpy(planes, at + label_bytes, sizeof planes);
        for (x = 0; x < 1024; x++)
            for (k = 0; k < 3; k++) at[label_bytes + x * 3 + k] = planes[k * 1024 + x];
    }
    return ckca__fit_all(ctx, bytes + label_bytes, record, (int)(size / record), 32, 32, 3, store, first);
}
/* Parses n names, one per line, without empty lines. bytes end in a zero and are overwritten; names point into them. */
static ckca_status ckca__parse_lines(ckca_context *ctx, const char *path, char *bytes, const char **names, int n) {
    int found = 0;
    char *at = bytes;
    while (*at) {
        size_t length = strcspn(at, "\r\n");
        char *next = at + length + (at[length] != 0);
        at[length] = 0;
        if (length && found < n) names[found] = at;
        if (length) found++;
        at = next;
    }
    if (found != n) return ckca__fail(ctx, CKCA_EFORMAT, "%s: %d names for %d classes", ckca__tail(path), found, n);
    return CKCA_OK;
}
#endif /* CKCA_NO_STDIO */

/* 4 bytes, big-endian. */
static uint32_t ckca__big_endian(const unsigned char *b) {
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

#ifndef CKCA_NO_STDIO
/* Parses the header of an IDX file (LeCun's description of MNIST): 0, 0, type 8 (bytes), the number of dimensions, and
   each dimension in 4 big-endian bytes, which go to shape[0..dims). The data follows. */
static ckca_status ckca__parse_idx(ckca_context *ctx, const char *path, const unsigned char *bytes, size_t size,
                                   int dims, size_t *shape) {
    size_t total = 1, header = 4 + 4 * (size_t)dims;
    int i;
    if (size < header)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: %.0f bytes, but an IDX header has %.0f", ckca__tail(path),
                          (double)size, (double)header);
    if (bytes[0] || bytes[1] || bytes[2] != 8 || bytes[3] != dims)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: begins with %02x%02x%02x%02x, expected 000008%02x%s",
                          ckca__tail(path), bytes[0], bytes[1], bytes[2], bytes[3], dims,
                          bytes[0] == 0x1f && bytes[1] == 0x8b
                              ? " (gzip-compressed: rename it to end in .gz and unpack it with gunzip)"
                              : "");
    for (i = 0; i < dims; i++) {
        shape[i] = ckca__big_endian(bytes + 4 + 4 * i);
        total = ckca__mul(total, shape[i]);
    }
    if (total != size - header)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: %.0f bytes after the header, but its dimensions need %.0f%s",
                          ckca__tail(path), (double)(size - header), (double)total,
                          total > size - header ? " (truncated?)" : "");
    if (shape[0] == 0 || shape[0] > INT_MAX)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: %.0f pictures", ckca__tail(path), (double)shape[0]);
    if (dims == 3 && (!shape[1] || !shape[2] || shape[1] > CKCA__MAX_SIDE || shape[2] > CKCA__MAX_SIDE))
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: pictures of %.0f x %.0f, sides may be 1 to %d", ckca__tail(path),
                          (double)shape[1], (double)shape[2], (int)CKCA__MAX_SIDE);
    return CKCA_OK;
}
/* Creates data from the bytes of the two files of an IDX set. */
static ckca_status ckca__parse_idx_pair(ckca_context *ctx, ckca_data **data, const char *pictures_path,
                                        const unsigned char *pictures, size_t pictures_size, const char *labels_path,
                                        const unsigned char *labels, size_t labels_size, const ckca_data_desc *desc) {
    size_t shape[3], label_shape[1] = {0}, i;
    int classes = 10; /* at least: a set of digits without any 9 still has ten classes */
    ckca__store *store;
    ckca_status status = ckca__parse_idx(ctx, pictures_path, pictures, pictures_size, 3, shape);
    if (!status) status = ckca__parse_idx(ctx, labels_path, labels, labels_size, 1, label_shape);
    if (status) return status;
    if (shape[0] != label_shape[0])
        return ckca__fail(ctx, CKCA_EFORMAT, "%s has %.0f pictures, but its label file has %.0f labels",
                          ckca__tail(pictures_path), (double)shape[0], (double)label_shape[0]);
    for (i = 0; i < shape[0]; i++) {
        if (desc->classes && labels[8 + i] >= desc->classes)
            return ckca__fail(ctx, CKCA_EINVAL, "%s: picture %.0f is of class %d, not one of the %d requested",
                              ckca__tail(labels_path), (double)i, labels[8 + i], desc->classes);
        if (labels[8 + i] >= classes) classes = labels[8 + i] + 1;
    }
    if (desc->classes) classes = desc->classes;
    status =
        ckca__store_create(ctx, &store, shape[0], (int)shape[1], (int)shape[2], 1, classes, desc->class_names, desc);
    if (status) return status;
    for (i = 0; i < shape[0]; i++) store->labels[i] = labels[8 + i];
    status =
        ckca__fit_all(ctx, pictures + 16, shape[1] * shape[2], store->count, (int)shape[1], (int)shape[2], 1, store, 0);
    if (!status) status = ckca__view(data, store, NULL, store->count);
    ckca__store_release(store);
    return status;
}
/* The checks of all ckca_open_* calls on files. desc becomes a checked copy of desc_or_null. */
static ckca_status ckca__open(ckca_context *ctx, ckca_data **data, const char *dir, ckca_part part,
                              const ckca_data_desc *desc_or_null, ckca_data_desc *desc) {
    ckca__bound bound = {"part", 0, CKCA_PART_TRAIN, CKCA_PART_TEST, 0};
    ckca_status status;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!data || !dir) return ckca__null(ctx, "opening data", !data ? "data" : "dir");
    bound.value = (int)part;
    if ((status = ckca__check_bounds(ctx, "opening data", &bound, 1))) return status;
    return ckca__data_desc(ctx, desc_or_null, desc);
}
/* A file that shows a wrong download or a missing step, and the message for it. */
typedef struct ckca__mistake {
    const char *name, *meaning;
} ckca__mistake;
/* Finds the folder with one of the files: dir or one of its subfolders inside. If there is none, reports the first of
   the mistakes, or else returns dir, so that opening it fails. NULL ends each list. The caller releases *found. */
static ckca_status ckca__find_set(ckca_context *ctx, const char *dir, const char *const *files,
                                  const char *const *inside, const ckca__mistake *mistakes, char **found) {
    char *path, above[64];
    int i, k, there;
    size_t size;
    FILE *file;
    ckca_status status = CKCA_OK;
    for (i = -1; !status && (i < 0 || inside[i]); i++) {
        *found = ckca__path(ctx, dir, i < 0 ? "." : inside[i]);
        if (!*found) return ckca__fail(ctx, CKCA_ENOMEM, "no memory for a path");
        if (i < 0) (*found)[strlen(dir)] = 0;
        for (k = 0; !status && files[k]; k++) {
            path = ckca__path(ctx, *found, files[k]);
            there = path && ckca__file_exists(path);
            if (!path) status = ckca__fail(ctx, CKCA_ENOMEM, "no memory for a path");
            ckca__release(ctx, path);
            if (there) return CKCA_OK;
        }
        ckca__release(ctx, *found);
        *found = NULL;
    }
    for (i = -2; !status && (i < 0 || mistakes[i].name); i++) {
        snprintf(above, sizeof above, i < -1 ? "../%s" : "%s.gz", files[0]);
        path = ckca__path(ctx, dir, i < 0 ? above : mistakes[i].name);
        there = path && ckca__file_exists(path);
        if (!path)
            status = ckca__fail(ctx, CKCA_ENOMEM, "no memory for a path");
        else if (there && i == -2)
            status =
                ckca__fail(ctx, CKCA_EIO, "%s: %s is in the folder above, not in this one", ckca__tail(dir), files[0]);
        else if (there && i == -1)
            status = ckca__fail(ctx, CKCA_EIO, "%s: compressed: unpack it with gunzip", ckca__tail(path));
        else if (there)
            status = ckca__fail(ctx, CKCA_EIO, "%s: contains %s, which is %s", ckca__tail(dir), mistakes[i].name,
                                mistakes[i].meaning);
        ckca__release(ctx, path);
    }
    if (!status && ckca__open_file(ctx, dir, SIZE_MAX, &file, &size) == CKCA_OK) {
        fclose(file);
        status = ckca__fail(ctx, CKCA_EIO, "%s: is a file: pass the folder that contains it", ckca__tail(dir));
    }
    if (status) return status;
    *found = ckca__path(ctx, dir, ".");
    if (!*found) return ckca__fail(ctx, CKCA_ENOMEM, "no memory for a path");
    (*found)[strlen(dir)] = 0;
    return CKCA_OK;
}
/* Reads the files in dir in order. Class names: names_file in dir if it exists, else default_names (NULL: none). */
static ckca_status ckca__open_cifar(ckca_context *ctx, ckca_data **data, const char *dir, const char *const *files,
                                    int file_count, int label_bytes, int classes, const char *names_file,
                                    const char *const *default_names, const ckca_data_desc *desc) {
    const char *names[100];
    char *path[6] = {NULL, NULL, NULL, NULL, NULL, NULL};
    unsigned char *lines = NULL, *bytes;
    size_t size, total = 0, done = 0, record = (size_t)label_bytes + 3072;
    int label[100], i, named = default_names != NULL;
    ckca__store *store = NULL;
    FILE *file;
    ckca_status status = CKCA_OK;
    for (i = 0; i <= file_count; i++) {
        path[i] = ckca__path(ctx, dir, i < file_count ? files[i] : names_file);
        if (!path[i]) status = ckca__fail(ctx, CKCA_ENOMEM, "no memory for a path");
    }
    for (i = 0; !status && i < file_count; i++) {
        unsigned char begin[2] = {0, 0};
        status = ckca__open_file(ctx, path[i], (size_t)1 << 30, &file, &size);
        if (status) break;
        if (fread(begin, 1, 2, file) == 2 && begin[0] == 0x1f && begin[1] == 0x8b && size % record)
            status =
                ckca__fail(ctx, CKCA_EFORMAT, "%s: gzip-compressed: rename it to end in .gz and unpack it with gunzip",
                           ckca__tail(path[i]));
        fclose(file);
        if (!status) status = ckca__check_cifar(ctx, path[i], size, record);
        total += size;
    }
    for (i = 0; i < classes; i++) names[i] = default_names ? default_names[i] : NULL;
    if (!status && ckca__file_exists(path[file_count])) {
        named = 1;
        status = ckca__read_file(ctx, path[file_count], 1 << 20, &lines, &size);
        if (!status) status = ckca__parse_lines(ctx, path[file_count], (char *)lines, names, classes);
    }
    if (!status && desc->classes && !(named && desc->class_names) && desc->classes != classes)
        status = ckca__fail(ctx, CKCA_EINVAL, "%s: has %d classes, but %d were requested", ckca__tail(dir), classes,
                            desc->classes);
    /* if the data's names are known, desc may list them in another order */
    for (i = 0; i < classes; i++)
        label[i] =
            named && desc->class_names && !status ? ckca__find_name(desc->class_names, desc->classes, names[i]) : i;
    if (!status && desc->class_names)
        status = ckca__store_create(ctx, &store, total / record, 32, 32, 3, desc->classes, desc->class_names, desc);
    else if (!status)
        status = ckca__store_create(ctx, &store, total / record, 32, 32, 3, classes, named ? names : NULL, desc);
    for (i = 0; !status && i < file_count; i++) {
        status = ckca__read_file(ctx, path[i], (size_t)1 << 30, &bytes, &size);
        if (status) break;
        if (size / record > (size_t)store->count - done)
            status = ckca__fail(ctx, CKCA_EIO, "%s: grew while it was read", ckca__tail(path[i]));
        if (!status)
            status = ckca__parse_cifar(ctx, path[i], bytes, size, label_bytes, classes, label, store, (int)done);
        ckca__release(ctx, bytes);
        done += size / record;
    }
    if (!status && done != (size_t)store->count)
        status = ckca__fail(ctx, CKCA_EIO, "%s: shrank while it was read", ckca__tail(dir));
    if (!status) status = ckca__view(data, store, NULL, store->count);
    ckca__store_release(store);
    ckca__release(ctx, lines);
    for (i = 0; i <= file_count; i++) ckca__release(ctx, path[i]);
    return status;
}
CKCA_API ckca_status ckca_open_cifar10(ckca_context *ctx, ckca_data **data, const char *dir, ckca_part part,
                                       const ckca_data_desc *desc_or_null) {
    static const char *const train[] = {"data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin",
                                        "data_batch_5.bin"};
    static const char *const test[] = {"test_batch.bin"};
    static const char *const names[] = {"airplane", "automobile", "bird",  "cat",  "deer",
                                        "dog",      "frog",       "horse", "ship", "truck"};
    static const char *const inside[] = {"cifar-10-batches-bin", NULL};
    static const char python[] =
        "the Python version of CIFAR-10: the binary version is needed (cifar-10-binary.tar.gz)";
    static const ckca__mistake mistakes[] = {{"cifar-10-binary.tar.gz", "an archive: unpack it with tar -xzf"},
                                             {"data_batch_1", python},
                                             {"test_batch", python},
                                             {"cifar-10-batches-py", python},
                                             {"cifar-10-python.tar.gz", python},
                                             {"train.bin", "a file of CIFAR-100"},
                                             {NULL, NULL}};
    const char *file[2] = {NULL, NULL};
    char *found = NULL;
    ckca_data_desc desc;
    ckca_status status = ckca__open(ctx, data, dir, part, desc_or_null, &desc);
    if (status) return status;
    file[0] = part == CKCA_PART_TRAIN ? train[0] : test[0];
    status = ckca__find_set(ctx, dir, file, inside, mistakes, &found);
    if (!status)
        status = ckca__open_cifar(ctx, data, found, part == CKCA_PART_TRAIN ? train : test,
                                  part == CKCA_PART_TRAIN ? 5 : 1, 1, 10, "batches.meta.txt", names, &desc);
    ckca__release(ctx, found);
    return status;
}
CKCA_API ckca_status ckca_open_cifar100(ckca_context *ctx, ckca_data **data, const char *dir, ckca_part part,
                                        const ckca_data_desc *desc_or_null) {
    static const char *const files[2][2] = {{"train.bin", NULL}, {"test.bin", NULL}};
    static const char *const inside[] = {"cifar-100-binary", NULL};
    static const char python[] =
        "the Python version of CIFAR-100: the binary version is needed (cifar-100-binary.tar.gz)";
    static const ckca__mistake mistakes[] = {{"cifar-100-binary.tar.gz", "an archive: unpack it with tar -xzf"},
                                             {"meta", python},
                                             {"train", python},
                                             {"test", python},
                                             {"cifar-100-python", python},
                                             {"cifar-100-python.tar.gz", python},
                                             {"data_batch_1.bin", "a file of CIFAR-10"},
                                             {NULL, NULL}};
    char *found = NULL;
    ckca_data_desc desc;
    ckca_status status = ckca__open(ctx, data, dir, part, desc_or_null, &desc);
    if (status) return status;
    status = ckca__find_set(ctx, dir, files[part], inside, mistakes, &found);
    if (!status)
        status = ckca__open_cifar(ctx, data, found, files[part], 1, 2, 100, "fine_label_names.txt", NULL, &desc);
    ckca__release(ctx, found);
    return status;
}
CKCA_API ckca_status ckca_open_idx(ckca_context *ctx, ckca_data **data, const char *dir, ckca_part part,
                                   const ckca_data_desc *desc_or_null) {
    static const char *const what[] = {"images-idx3-ubyte", "labels-idx1-ubyte"};
    static const char *const files[2][5] = {{"train-images-idx3-ubyte", "train-images.idx3-ubyte",
                                             "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte.gz", NULL},
                                            {"t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte",
                                             "t10k-images-idx3-ubyte.gz", "t10k-images.idx3-ubyte.gz", NULL}};
    static const char *const inside[] = {"raw", "MNIST/raw", "FashionMNIST/raw",
                                         NULL}; /* where torchvision puts them */
    static const ckca__mistake mistakes[] = {{NULL, NULL}};
    char name[2][64], *found = NULL;
    char *path[2] = {NULL, NULL};
    unsigned char *bytes[2] = {NULL, NULL};
    size_t size[2] = {0, 0};
    ckca_data_desc desc;
    int i, form;
    ckca_status status = ckca__open(ctx, data, dir, part, desc_or_null, &desc);
    if (!status) status = ckca__find_set(ctx, dir, files[part], inside, mistakes, &found);
    for (i = 0; i < 2 && !status; i++) {
        for (form = 0; form < 4; form++) { /* with a hyphen or a dot (some tools write that); then both compressed */
            snprintf(name[i], sizeof name[i], "%s-%s%s", part == CKCA_PART_TRAIN ? "train" : "t10k", what[i],
                     form < 2 ? "" : ".gz");
            if (form & 1) *strstr(name[i], "-idx") = '.';
            ckca__release(ctx, path[i]);
            path[i] = ckca__path(ctx, found, name[i]);
            if (!path[i] || ckca__file_exists(path[i])) break;
        }
        if (!path[i])
            status = ckca__fail(ctx, CKCA_ENOMEM, "no memory for a path");
        else if (form == 2 || form == 3)
            status = ckca__fail(ctx, CKCA_EIO, "%s: compressed: unpack it with gunzip", ckca__tail(path[i]));
        else if (form == 4)
            status = ckca__fail(ctx, CKCA_EIO, "%s: contains no %s-%s", ckca__tail(dir),
                                part == CKCA_PART_TRAIN ? "train" : "t10k", what[i]);
        else
            status = ckca__read_file(ctx, path[i], (size_t)1 << 31, &bytes[i], &size[i]);
    }
    if (!status)
        status = ckca__parse_idx_pair(ctx, data, path[0], bytes[0], size[0], path[1], bytes[1], size[1], &desc);
    for (i = 0; i < 2; i++) {
        ckca__release(ctx, bytes[i]);
        ckca__release(ctx, path[i]);
    }
    ckca__release(ctx, found);
    return status;
}
#endif /* CKCA_NO_STDIO */

/* --- Picture files ------------------------------------------------------------------------------------------------ */

/* Memory of one decoder thread: everything that reading and decoding a picture allocates comes from one block, and is
   taken back at once before the next picture. What does not fit comes from malloc; the block is then enlarged, so that
   memory is allocated only for a picture that needs more than all before it. */
typedef struct ckca__scratch {
    char *block;
    size_t bytes, used, most; /* most: the most used by this picture, including what did not fit */
    void *turbo;              /* TurboJPEG's handle, or NULL */
} ckca__scratch;
typedef struct ckca__scratch_head {
    size_t bytes, at; /* including this head; where it begins, counted from the block's start */
} ckca__scratch_head;

static void *ckca__scratch_alloc(size_t bytes, void *user) {
    ckca__scratch *s = (ckca__scratch *)user;
    const size_t need = ckca__round_up(ckca__sum(bytes, sizeof(ckca__scratch_head)), 16);
    const int fits = s->used <= s->bytes && need <= s->bytes - s->used;
    ckca__scratch_head *head;
    if (need > SIZE_MAX / 4) return NULL;
    head = (ckca__scratch_head *)(fits ? (void *)(s->block + s->used) : malloc(need));
    if (!head) return NULL;
    head->bytes = need;
    head->at = s->used;
    s->used += need;
    if (s->used > s->most) s->most = s->used;
    return head + 1;
}
static int ckca__scratch_inside(const ckca__scratch *s, const void *memory) {
    const uintptr_t begin = (uintptr_t)s->block, at = (uintptr_t)memory;
    return s->block && at >= begin && at - begin < s->bytes;
}
static void ckca__scratch_free(void *memory, ckca__scratch *s) {
    ckca__scratch_head *head;
    if (!memory) return;
    head = (ckca__scratch_head *)memory - 1;
    if (head->at + head->bytes == s->used) s->used = head->at; /* the last one; others wait for the next picture */
    if (!ckca__scratch_inside(s, head)) free(head);
}
static void ckca__scratch_release(void *memory, size_t bytes, void *user) {
    (void)bytes;
    ckca__scratch_free(memory, (ckca__scratch *)user);
}
/* Before every picture. If there is no memory for a larger block, malloc goes on serving what does not fit. */
static void ckca__scratch_reset(ckca__scratch *s) {
    if (s->most > s->bytes) {
        const size_t bytes = ckca__round_up(s->most + s->most / 8, (size_t)1 << 16);
        free(s->block);
        s->block = (char *)malloc(bytes);
        s->bytes = s->block ? bytes : 0;
    }
    s->used = s->most = 0;
}

#ifndef CKCA_NO_STB_IMAGE
/* stb_image (Debian: libstb-dev), static, JPEG and PNG only, from beside this header or from the include path. If the
   program has included its own before this header, that one is used (and allocates for every picture). Its memory comes
   zeroed, from calloc or from a decoder thread's ckca__scratch; an STBI_MALLOC of yours must zero it too: with a
   corrupt JPEG, stb_image before 2.29 can read tables that the file never defined. */
#if defined(__cplusplus) && __cplusplus >= 201103L
#define CKCA__THREAD thread_local
#elif defined(__GNUC__)
#define CKCA__THREAD __thread
#elif defined(_MSC_VER)
#define CKCA__THREAD __declspec(thread)
#else
#define CKCA__THREAD
#endif
static CKCA__THREAD ckca__scratch *ckca__scratch_now; /* of this thread while it decodes a picture from it; else NULL */
#ifndef STBI_INCLUDE_STB_IMAGE_H
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#define STBI_NO_GIF
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_FAILURE_USERMSG
#define STBI_MAX_DIMENSIONS CKCA__MAX_SIDE
#ifndef STBI_ASSERT
#define STBI_ASSERT(condition) ((void)0)
#endif
#ifndef STBI_MALLOC
#define STBI_MALLOC(bytes) calloc(1, bytes)
#define STBI_REALLOC(memory, bytes) realloc(memory, bytes)
#define STBI_FREE(memory) free(memory)
#endif
/* 1: an allocation of stb_image failed since this was cleared; stb_image does not always report it. */
static CKCA__THREAD int ckca__stb_refused;
static void *ckca__stb_malloc(size_t bytes) {
    ckca__scratch *s = ckca__scratch_now;
    void *memory = s ? ckca__scratch_alloc(bytes, s) : STBI_MALLOC(bytes);
    if (!memory) ckca__stb_refused = 1;
    if (s && memory) memset(memory, 0, bytes); /* as calloc */
    return memory;
}
static void ckca__stb_free(void *memory) {
    if (ckca__scratch_now)
        ckca__scratch_free(memory, ckca__scratch_now);
    else
        STBI_FREE(memory);
}
static void *ckca__stb_realloc(void *memory, size_t bytes) {
    if (ckca__scratch_now) {
        const size_t had = memory ? ((ckca__scratch_head *)memory)[-1].bytes - sizeof(ckca__scratch_head) : 0;
        void *grown = ckca__scratch_alloc(bytes, ckca__scratch_now);
        if (grown && memory) memcpy(grown, memory, had < bytes ? had : bytes);
        if (grown) ckca__scratch_free(memory, ckca__scratch_now);
        memory = grown;
    } else {
        memory = STBI_REALLOC(memory, bytes);
    }
    if (!memory) ckca__stb_refused = 1;
    return memory;
}
#undef STBI_MALLOC
#undef STBI_REALLOC
#undef STBI_FREE
#define STBI_MALLOC(bytes) ckca__stb_malloc(bytes)
#define STBI_REALLOC(memory, bytes) ckca__stb_realloc(memory, bytes)
#define STBI_FREE(memory) ckca__stb_free(memory)
#define CKCA__STB_COUNTED
/* stb_image declares one name and defines the other. */
#define stbi_set_unpremultiply_on_load_thread stbi__unpremultiply_on_load_thread
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wcast-qual"
#pragma GCC diagnostic ignored "-Wdouble-promotion"
#endif
#ifdef __has_include
#if __has_include("stb_image.h")
#include "stb_image.h"
#elif __has_include(<stb/stb_image.h>)
#include <stb/stb_image.h>
#else
#error "no stb_image.h: install it (Debian: libstb-dev), put it beside this header, or define CKCA_NO_STB_IMAGE"
#endif
#else
#include "stb_image.h"
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#undef STB_IMAGE_IMPLEMENTATION
#undef stbi_set_unpremultiply_on_load_thread
#endif
#ifdef CKCA_TURBOJPEG
#include <turbojpeg.h>
#endif
#ifndef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION                     /* a fuzzer cannot guess checksums */
static uint32_t ckca__crc(const unsigned char *bytes, size_t size) { /* of a PNG chunk (PNG specification, annex D) */
    uint32_t crc = 0xffffffffu;
    size_t i;
    int bit;
    for (i = 0; i < size; i++) {
        crc ^= bytes[i];
        for (bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}
#endif
/* What validation finds in a picture file. */
typedef struct ckca__picture {
    int64_t height, width; /* as stored */
    int orientation;       /* EXIF's orientation, 1 to 8; 1: as stored */
    size_t end;            /* of a JPEG without its end marker: bytes up to the end of its data. Else 0 */
    size_t rewritten;      /* of a PNG that ckca__rewrite_png must rewrite: the most bytes of the result. Else 0 */
} ckca__picture;
/* Orientation (tag 0x112), 1 to 8, in an EXIF block, which is a TIFF file; 1 if it has none. A damaged block is no
   error: the picture can still be read. */
static int ckca__exif_orientation(const unsigned char *tiff, size_t size) {
    size_t at, entries, i;
    int big = size >= 8 && tiff[0] == 'M';
    if (size < 8 || memcmp(tiff, big ? "MM\0*" : "II*\0", 4) != 0) return 1;
#define CKCA__EXIF(at, i) ((size_t)tiff[(at) + (big ? (i) : 1 - (i))]) /* byte i, big end first, of a 2-byte number */
#define CKCA__EXIF_SHORT(at) (CKCA__EXIF(at, 0) << 8 | CKCA__EXIF(at, 1))
    at = CKCA__EXIF_SHORT(4) << (big ? 16 : 0) | CKCA__EXIF_SHORT(6) << (big ? 0 : 16);
    if (at > size - 2) return 1;
    entries = CKCA__EXIF_SHORT(at);
    for (i = 0, at += 2; i < entries && size - at >= 12; i++, at += 12) { /* tag, type, count, value */
        size_t type = CKCA__EXIF_SHORT(at + 2), value = 0;
        if (CKCA__EXIF_SHORT(at) != 0x112) continue;
        if (type == 3) value = CKCA__EXIF_SHORT(at + 8);
        if (type == 4 && CKCA__EXIF_SHORT(at + (big ? 8 : 10)) == 0) value = CKCA__EXIF_SHORT(at + (big ? 10 : 8));
        return value >= 1 && value <= 8 ? (int)value : 1;
    }
#undef CKCA__EXIF_SHORT
#undef CKCA__EXIF
    return 1;
}
static const char ckca__truncated[] = "truncated: it ends before its end marker";
static const char ckca__no_memory[] = "no memory to check it"; /* the only flaw that is not of the file */
/* Validates a PNG chunk by chunk; returns its flaw, or NULL. stb_image checks the compressed data. */
static const char *ckca__walk_png(const unsigned char *bytes, size_t size, ckca__picture *picture) {
    static const unsigned char depths[7] = {1 | 2 | 4 | 8 | 16, 0, 8 | 16, 1 | 2 | 4 | 8, 8 | 16, 0, 8 | 16};
    int type = -1, palette = 0, data = 0; /* data: 1: an IDAT chunk was seen; 2: one with bytes */
    size_t at, length;
    for (at = 8; size - at >= 12; at += 12 + length) { /* length, type, data, checksum of type and data */
        const unsigned char *name = bytes + at + 4, *chunk = bytes + at + 8;
        length = ckca__big_endian(bytes + at);
        if (length > size - at - 12) return ckca__truncated;
#ifndef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
        if (ckca__crc(name, length + 4) != ckca__big_endian(chunk + length)) return "corrupt: wrong checksum";
#endif
        if (!memcmp(name, "CgBI", 4)) return "Apple's variant of PNG (CgBI) is not supported";
        if ((at == 8) != !memcmp(name, "IHDR", 4) || (at == 8 && length != 13))
            return "corrupt: it must begin with one header chunk (IHDR) of 13 bytes";
        if (at == 8) {
            picture->width = ckca__big_endian(chunk);
            picture->height = ckca__big_endian(chunk + 4);
            type = chunk[9];
            if (type > 6 || !(depths[type] & chunk[8]) || (chunk[8] & (chunk[8] - 1)))
                return "corrupt: its colour type does not allow its bit depth";
            if (chunk[10] || chunk[11] || chunk[12] > 1)
                return "corrupt: unknown compression, filter or interlace method";
        } else if (!memcmp(name, "PLTE", 4)) {
            if (length % 3 || length < 3 || length > 768 || palette || data) return "corrupt: bad palette (PLTE)";
            palette = (int)length / 3;
            if (type == 3 && length < (size_t)3 << bytes[24]) picture->rewritten = size + ((size_t)3 << bytes[24]);
        } else if (!memcmp(name, "tRNS", 4)) {
            if (data || type > 3 || (type == 3 ? length > (size_t)palette : length != (type ? 6 : 2)))
                return "corrupt: bad transparency (tRNS)";
        } else if (!memcmp(name, "IDAT", 4)) {
            if (type == 3 && !palette) return "corrupt: no palette before its pixel data";
            if (!data) data = 1;
            if (length)
                data = 2;
            else if (!picture->rewritten)
                picture->rewritten = size;
        } else if (!memcmp(name, "eXIf", 4)) {
            size_t prefix = length > 6 && !memcmp(chunk, "Exif\0", 6) ? 6 : 0; /* some writers leave JPEG's there */
            picture->orientation = ckca__exif_orientation(chunk + prefix, length - prefix);
        } else if (!memcmp(name, "IEND", 4)) {
            return data == 2 ? NULL : "corrupt: no pixel data";
        } else if (!(name[0] & 0x20)) {
            return "unknown critical chunk";
        }
    }
    return ckca__truncated;
}
/* Rewrites a validated PNG for stb_image, which takes the colours of pixels beyond a short palette from uninitialised
   memory, and copies an empty chunk of data to a null pointer: black is appended to the palette, as in Pillow, and empty
   chunks of data are left out. Checksums are not rewritten, since stb_image ignores them.
   Returns the bytes written. */
static size_t ckca__rewrite_png(const unsigned char *bytes, size_t size, unsigned char *out) {
    size_t at, length, colours = bytes[25] == 3 ? (size_t)3 << bytes[24] : 0, n = 8;
    memcpy(out, bytes, 8);
    for (at = 8; size - at >= 12; at += 12 + length) {
        const unsigned char *name = bytes + at + 4;
        length = ckca__big_endian(bytes + at);
        if (!memcmp(name, "IDAT", 4) && !length) continue;
        memcpy(out + n, bytes + at, 12 + length);
        if (!memcmp(name, "PLTE", 4) && length < colours) {
            out[n + 2] = (unsigned char)(colours >> 8);
            out[n + 3] = (unsigned char)colours;
            memset(out + n + 8 + length, 0, colours - length + 4);
            n += colours - length;
        }
        n += 12 + length;
        if (!memcmp(name, "IEND", 4)) break;
    }
    return n;
}
/* --- JPEG (ITU-R T.81) ---

   stb_image replaces missing data by grey, or stops and returns what it has. So the file is validated first, marker by
   marker. If markers are not enough (is the data complete although the end marker is missing? does each restart
   interval end at its marker?), the Huffman codes of the data are read too, without computing coefficients. */
typedef struct ckca__jpeg_codes { /* a Huffman table */
    const unsigned char *counts;  /* in the file: counts of codes of 1 to 16 bits, then symbols. NULL: undefined */
    uint16_t fast[512];           /* by the next 9 bits: length << 8 | symbol; 0: a longer code */
} ckca__jpeg_codes;
typedef struct ckca__jpeg_component {
    int id, h, v, quantization;
    int across, down, stride; /* its size in blocks; blocks per row including the padding of the last MCU */
    int dc, ac;               /* Huffman tables in the current scan */
    int scanned;              /* 1: a DC scan was read */
    uint64_t exact;           /* bit k: coefficient k is known to its last bit */
    uint64_t *nonzero;        /* progressive, if codes are read: bit k of each block: coefficient k is not 0 */
} ckca__jpeg_component;
typedef struct ckca__jpeg {
    const unsigned char *bytes;
    size_t size, at, scan_end; /* scan_end: end of the last scan's data */
    int read_codes;            /* 1: the Huffman codes of the data are read */
    int unfinished;            /* 1: the file ended without a marker */
    int progressive, components, across, down, interval, adobe;
    int restarts;          /* 1: a scan had a restart interval */
    unsigned quantization; /* bit t: table t is defined */
    /* the current scan: spectral selection, successive approximation, components */
    int first, last, high, low, scan_components, order[4];
    int64_t mcu, mcus;
    unsigned eob_run;                /* blocks left in the end-of-band run */
    const unsigned char *next, *end; /* bytes that are not in the buffer yet */
    uint32_t buffer;                 /* the next bits, from the top */
    int bits, added;                 /* bits in the buffer; those of them beyond the end of the data */
    uint64_t used;                   /* bits taken since the last restart */
    ckca__jpeg_component component[4];
    ckca__jpeg_codes codes[2][4]; /* DC, AC */
} ckca__jpeg;
static void ckca__jpeg_take(ckca__jpeg *j, int n) { /* drops n bits, 0 to 16, and refills */
    for (; j->bits <= 24; j->bits += 8) {
        uint32_t byte = 0;
        if (j->next < j->end) {
            byte = *j->next++;
            if (byte == 0xff) { /* skips padding and the stuffed zero */
                while (j->next < j->end && *j->next == 0xff) j->next++;
                if (j->next < j->end) j->next++;
            }
        } else {
            j->added += 8;
        }
        j->buffer |= byte << (24 - j->bits);
    }
    j->buffer <<= n;
    j->bits -= n;
    j->used += (uint64_t)n;
}
static unsigned ckca__jpeg_number(ckca__jpeg *j, int n) { /* n bits, 0 to 16 */
    unsigned value;
    ckca__jpeg_take(j, 0);
    value = n ? j->buffer >> (32 - n) : 0;
    ckca__jpeg_take(j, n);
    return value;
}
static int ckca__jpeg_symbol(ckca__jpeg *j, const ckca__jpeg_codes *codes) { /* -1: invalid code */
    unsigned fast, code = 0, index = 0;
    int length;
    ckca__jpeg_take(j, 0);
    fast = codes->fast[j->buffer >> 23];
    if (fast) {
        ckca__jpeg_take(j, (int)(fast >> 8));
        return (int)(fast & 255);
    }
    for (length = 1; length <= 16; length++) { /* code: the first code of this length */
        unsigned n = codes->counts[length - 1], bits = j->buffer >> (32 - length);
        if (bits - code < n) {
            ckca__jpeg_take(j, length);
            return codes->counts[16 + index + (bits - code)];
        }
        index += n;
        code = (code + n) << 1;
    }
    return -1;
}
static void ckca__jpeg_fast(ckca__jpeg_codes *codes) {
    unsigned code = 0, index = 0, n, i;
    int length;
    memset(codes->fast, 0, sizeof codes->fast);
    for (length = 1; length <= 9; length++, code <<= 1)
        for (n = codes->counts[length - 1]; n; n--, code++, index++)
            for (i = 0; i < 512u >> length; i++)
                codes->fast[(code << (9 - length) | i) & 511] =
                    (uint16_t)((unsigned)length << 8 | codes->counts[16 + index]);
}
/* Reads the codes of one block of the current scan (F.1.2, G.1.2). 0: an invalid code. */
static int ckca__jpeg_block(ckca__jpeg *j, const ckca__jpeg_component *component, uint64_t *nonzero) {
    const ckca__jpeg_codes *ac = &j->codes[1][component->ac];
    int k = j->first, symbol, zeros, bits;
    if (k == 0) { /* DC */
        if (j->high) {
            ckca__jpeg_take(j, 1);
        } else {
            bits = ckca__jpeg_symbol(j, &j->codes[0][component->dc]);
            if (bits < 0 || bits > 15) return 0;
            ckca__jpeg_take(j, bits);
        }
        k = 1;
    }
    if (j->eob_run) {
        j->eob_run--;
        zeros = 64; /* to the end */
    } else {
        zeros = -1;
    }
    while (k <= j->last) {
        int fresh = 0;
        if (zeros < 0) {
            symbol = ckca__jpeg_symbol(j, ac);
            if (symbol < 0) return 0;
            zeros = symbol >> 4;
            bits = symbol & 15;
            fresh = bits != 0;
            if (!bits && zeros < 15) { /* end of block; in progressive files, of a run of blocks */
                j->eob_run = (1u << zeros) - 1 + ckca__jpeg_number(j, zeros);
                if (!j->progressive) j->eob_run = 0;
                zeros = 64;
            } else if (bits) {
                if (j->high && bits != 1) return 0;
                ckca__jpeg_take(j, bits);
            }
        }
        if (!j->high) { /* first scan of these coefficients */
            k += zeros;
            if (fresh && nonzero && k < 64) *nonzero |= (uint64_t)1 << k;
            k++;
        } else {
            for (; k <= j->last; k++) { /* refinement: a bit for each coefficient that is not 0 */
                if (*nonzero >> k & 1) {
                    ckca__jpeg_take(j, 1);
                } else if (zeros-- == 0) {
                    if (fresh) *nonzero |= (uint64_t)1 << k;
                    k++;
                    break;
                }
            }
        }
        if (zeros != 64) zeros = -1;
    }
    return 1;
}
/* Reads the codes from begin to end: up to a restart marker (restart = 1) or the scan's end. Returns a flaw, or
   NULL. */
static const char *ckca__jpeg_data(ckca__jpeg *j, const unsigned char *begin, const unsigned char *end, int restart) {
    int64_t last = j->interval && j->interval < j->mcus - j->mcu ? j->mcu + j->interval : j->mcus;
    int i, x, y, whole = 1;
    j->next = begin;
    j->end = end;
    j->buffer = 0;
    j->bits = j->added = 0;
    j->used = 0;
    j->eob_run = 0;
    for (; whole && j->mcu < last; j->mcu++) {
        int across = j->scan_components == 1 ? j->component[j->order[0]].across : j->across;
        int row = (int)(j->mcu / across), column = (int)(j->mcu % across);
        for (i = 0; whole && i < j->scan_components; i++) {
            ckca__jpeg_component *component = &j->component[j->order[i]];
            int h = j->scan_components == 1 ? 1 : component->h, v = j->scan_components == 1 ? 1 : component->v;
            for (y = 0; whole && y < v; y++)
                for (x = 0; whole && x < h; x++)
                    whole = ckca__jpeg_block(
                        j, component,
                        component->nonzero
                            ? component->nonzero + (size_t)(row * v + y) * (size_t)component->stride + column * h + x
                            : NULL);
        }
        if (j->bits < j->added) /* read beyond the end of the data */
            return j->unfinished ? ckca__truncated : "corrupt: its data ends before its last pixel";
    }
    if (!whole)
        return j->unfinished && j->next == j->end && j->bits - j->added < 16 ? ckca__truncated
                                                                             : "corrupt: invalid code in its data";
    if (restart && (end > j->next || j->bits - j->added >= 8)) return "corrupt: extra bytes before a restart marker";
    if (j->unfinished) { /* bytes after the last code are not data */
        uint64_t left = (j->used + 7) / 8;
        for (; left; left--)
            if (*begin++ == 0xff) {
                while (*begin == 0xff) begin++;
                begin++;
            }
        j->at = (size_t)(begin - j->bytes);
    }
    return NULL;
}
/* Frame header (B.2.2). segment and length exclude the length field, here and below. Returns a flaw, or NULL. */
static const char *ckca__jpeg_frame(ckca_context *ctx, ckca__jpeg *j, const unsigned char *segment, size_t length,
                                    ckca__picture *picture) {
    int h_max = 1, v_max = 1, i;
    if (length < 6 || length != 6 + 3 * (size_t)segment[5]) return "corrupt: wrong length of a frame header";
    if (segment[0] != 8)
        return segment[0] == 12 ? "JPEG with 12 bits per sample is not supported (8 bits are)"
                                : "JPEG is supported only with 8 bits per sample";
    picture->height = segment[1] << 8 | segment[2];
    picture->width = segment[3] << 8 | segment[4];
    if (!picture->height || !picture->width) return "JPEG without height or width in its frame header is not supported";
    j->components = segment[5];
    if (j->components != 1 && j->components != 3 && j->components != 4)
        return "JPEG is supported only with 1, 3 or 4 components";
    for (i = 0; i < j->components; i++) {
        ckca__jpeg_component *component = &j->component[i];
        component->id = segment[6 + 3 * i];
        component->h = segment[7 + 3 * i] >> 4;
        component->v = segment[7 + 3 * i] & 15;
        component->quantization = segment[8 + 3 * i];
        if (component->h < 1 || component->h > 4 || component->v < 1 || component->v > 4 || component->quantization > 3)
            return "corrupt: sampling factor or table number of a component out of range";
        if (component->h > h_max) h_max = component->h;
        if (component->v > v_max) v_max = component->v;
    }
    if (picture->height > CKCA__MAX_SIDE || picture->width > CKCA__MAX_SIDE) return NULL; /* the caller refuses it */
    j->across = ((int)picture->width + 8 * h_max - 1) / (8 * h_max);
    j->down = ((int)picture->height + 8 * v_max - 1) / (8 * v_max);
    for (i = 0; i < j->components; i++) {
        ckca__jpeg_component *component = &j->component[i];
        if (h_max % component->h || v_max % component->v) return "JPEG with fractional subsampling is not supported";
        component->across = (((int)picture->width * component->h + h_max - 1) / h_max + 7) / 8;
        component->down = (((int)picture->height * component->v + v_max - 1) / v_max + 7) / 8;
        component->stride = j->across * component->h;
        if (j->read_codes && j->progressive && picture->height * picture->width <= CKCA__MAX_PIXELS) {
            ckca__lock(ctx);
            component->nonzero = (uint64_t *)ckca__alloc(
                ctx, (size_t)component->stride * (size_t)(j->down * component->v) * sizeof *component->nonzero);
            ckca__unlock(ctx);
            if (!component->nonzero) return ckca__no_memory;
        }
    }
    return NULL;
}
/* Scan header (B.2.3) and the data up to the next marker other than a restart. */
static const char *ckca__jpeg_scan(ckca__jpeg *j, const unsigned char *segment, size_t length) {
    static const char too_short[] = "corrupt: its data ends before its last pixel";
    int64_t least = 0, blocks; /* lower bound of the bits of its codes */
    size_t begin = j->at, interval_begin = begin;
    int i, k, restart = 0;
    uint64_t band;
    j->scan_components = length ? segment[0] : 0;
    if (j->scan_components < 1 || j->scan_components > j->components || length != 4 + 2 * (size_t)j->scan_components)
        return "corrupt: wrong length of a scan header";
    segment++;
    j->first = segment[2 * j->scan_components];
    j->last = segment[2 * j->scan_components + 1];
    j->high = segment[2 * j->scan_components + 2] >> 4;
    j->low = segment[2 * j->scan_components + 2] & 15;
    if (!j->progressive) {
        if (j->first || j->high || j->low) return "corrupt: wrong range of coefficients in a scan";
        j->last = 63;
    } else if (j->first > j->last || j->last > 63 || j->high > 13 || j->low > 13 ||
               (j->first ? j->scan_components > 1 : j->last > 0)) {
        return "corrupt: wrong range of coefficients in a scan";
    }
    band = (j->last == 63 ? ~(uint64_t)0 : ((uint64_t)1 << (j->last + 1)) - 1) & ~(((uint64_t)1 << j->first) - 1);
    for (i = 0; i < j->scan_components; i++) {
        ckca__jpeg_component *component;
        for (k = 0; k < j->components && j->component[k].id != segment[2 * i]; k++) {
        }
        if (k == j->components) return "corrupt: a scan of an undefined component";
        j->order[i] = k;
        component = &j->component[k];
        component->dc = segment[2 * i + 1] >> 4;
        component->ac = segment[2 * i + 1] & 15;
        if (component->dc > 3 || component->ac > 3) return "corrupt: a scan uses a Huffman table above 3";
        if (!(j->quantization >> component->quantization & 1)) return "corrupt: missing quantization table";
        if ((j->first == 0 && !j->high && !j->codes[0][component->dc].counts) ||
            (j->last > 0 && !j->codes[1][component->ac].counts))
            return "missing Huffman table (as in frames of Motion JPEG)";
        if (j->first == 0)
            component->scanned = 1;
        else if (!component->scanned)
            return "corrupt: a component's AC scan before its first DC scan";
        if (!j->low) component->exact |= band;
        for (k = 0; k < i; k++)
            if (j->order[k] == j->order[i]) return "corrupt: the same component twice in a scan";
        if (j->read_codes) {
            if (j->first == 0 && !j->high) ckca__jpeg_fast(&j->codes[0][component->dc]);
            if (j->last > 0) ckca__jpeg_fast(&j->codes[1][component->ac]);
        }
        blocks = j->scan_components == 1 ? (int64_t)component->across * component->down
                                         : (int64_t)j->across * j->down * component->h * component->v;
        if (j->first == 0)
            least += j->progressive ? blocks : 2 * blocks;
        else
            least = 1;
    }
    j->mcu = 0;
    j->mcus = j->scan_components == 1 ? (int64_t)j->component[j->order[0]].across * j->component[j->order[0]].down
                                      : (int64_t)j->across * j->down;
    if (j->interval) j->restarts = 1;
    for (;;) { /* from one byte ff to the next */
        const unsigned char *found = (const unsigned char *)memchr(j->bytes + j->at, 0xff, j->size - j->at);
        size_t marker = found ? (size_t)(found - j->bytes) : j->size, end = marker;
        const char *flaw = NULL;
        while (marker < j->size && j->bytes[marker] == 0xff) marker++; /* padding */
        j->at = marker + 1;
        j->unfinished = marker == j->size;
        if (!j->unfinished && j->bytes[marker] == 0) continue;                     /* a stuffed byte ff of the data */
        if (j->unfinished || j->bytes[marker] < 0xd0 || j->bytes[marker] > 0xd7) { /* the scan's end */
            j->at = end;
            if ((int64_t)(end - begin) * 8 < least) return j->unfinished ? ckca__truncated : too_short;
            if (j->interval && j->mcus > (restart + (int64_t)1) * j->interval)
                return j->unfinished ? ckca__truncated : "corrupt: missing restart markers";
            if (j->read_codes) flaw = ckca__jpeg_data(j, j->bytes + interval_begin, j->bytes + end, 0);
            j->scan_end = j->at;
            return flaw;
        }
        if (!j->interval) return "corrupt: restart marker without a restart interval";
        if (j->bytes[marker] != 0xd0 + restart % 8) return "corrupt: restart markers out of order";
        if (++restart > j->mcus / j->interval) return "corrupt: too many restart markers";
        if (j->read_codes) flaw = ckca__jpeg_data(j, j->bytes + interval_begin, j->bytes + end, 1);
        if (flaw) return flaw;
        interval_begin = j->at;
    }
}
/* Quantization tables (B.2.4.1). */
static const char *ckca__jpeg_quantization(ckca__jpeg *j, const unsigned char *segment, size_t length) {
    while (length) {
        size_t n = segment[0] >> 4 ? 129 : 65;
        if (segment[0] >> 4 > 1 || (segment[0] & 15) > 3 || length < n) return "corrupt: bad quantization tables";
        j->quantization |= 1u << (segment[0] & 15);
        segment += n;
        length -= n;
    }
    return NULL;
}
/* Huffman tables (B.2.4.2). Tables with more than 256 codes, or more codes of a length than its bits allow, would make
   stb_image before 2.29 write out of bounds. */
static const char *ckca__jpeg_huffman(ckca__jpeg *j, const unsigned char *segment, size_t length) {
    while (length) {
        size_t codes = 0, unused = 1, i;
        for (i = 1; i < 17 && i < length; i++) {
            codes += segment[i];
            unused *= 2;
            if (segment[i] > unused) return "corrupt: bad Huffman tables";
            unused -= segment[i];
        }
        if (codes > 256 || length < 17 + codes || segment[0] >> 4 > 1 || (segment[0] & 15) > 3)
            return "corrupt: bad Huffman tables";
        j->codes[segment[0] >> 4][segment[0] & 15].counts = segment + 1;
        segment += 17 + codes;
        length -= 17 + codes;
    }
    return NULL;
}
static const char *ckca__jpeg_walk(ckca_context *ctx, ckca__jpeg *j, ckca__picture *picture) {
    static const char *const kinds[16] = {
        /* by the second byte of the frame's marker, c0 to cf; NULL: supported, or no frame */
        NULL,
        NULL,
        NULL,
        "lossless JPEG is not supported",
        NULL,
        "hierarchical JPEG is not supported",
        "hierarchical JPEG is not supported",
        "hierarchical lossless JPEG is not supported",
        "JPEG with a reserved extension is not supported",
        "arithmetic-coded JPEG is not supported",
        "arithmetic-coded progressive JPEG is not supported",
        "arithmetic-coded lossless JPEG is not supported",
        NULL,
        "arithmetic-coded hierarchical JPEG is not supported",
        "arithmetic-coded hierarchical JPEG is not supported",
        "arithmetic-coded hierarchical lossless JPEG is not supported"};
    int frame = 0, scanned = 0, oriented = 0, i;
    const char *flaw = NULL;
    for (j->at = 2; !flaw;) {
        const unsigned char *segment;
        size_t length;
        int marker;
        while (!frame && j->at < j->size && j->bytes[j->at] != 0xff) j->at++; /* as in stb_image */
        if (j->at < j->size && j->bytes[j->at] != 0xff) return "corrupt: extra bytes between segments";
        while (j->at < j->size && j->bytes[j->at] == 0xff) j->at++;
        if (j->at >= j->size) break;
        marker = j->bytes[j->at++];
        if (!frame && marker == 0) continue;
        if (marker == 0xd9) {
            if (!scanned) return "corrupt: no pixel data";
            for (i = 0; i < j->components; i++)
                if (!j->component[i].scanned) return "corrupt: a component without data";
            return NULL;
        }
        if (marker < 0xc0 || (marker >= 0xd0 && marker <= 0xd8)) return "corrupt: unknown or misplaced marker";
        if (j->size - j->at < 2) break;
        segment = j->bytes + j->at + 2;
        length = (size_t)j->bytes[j->at] << 8 | j->bytes[j->at + 1];
        if (length < 2) return "corrupt: a segment shorter than its length field";
        if (length > j->size - j->at) break;
        j->at += length;
        length -= 2;
        if (marker <= 0xcf && kinds[marker - 0xc0]) return kinds[marker - 0xc0];
        if (marker == 0xdb) {
            flaw = ckca__jpeg_quantization(j, segment, length);
        } else if (marker == 0xc4) {
            flaw = ckca__jpeg_huffman(j, segment, length);
        } else if (marker == 0xdd) {
            if (length != 2) return "corrupt: wrong length of a restart interval segment";
            j->interval = segment[0] << 8 | segment[1];
        } else if (marker >= 0xc0 && marker <= 0xc2) {
            if (frame) return "corrupt: a second frame";
            frame = marker;
            j->progressive = marker == 0xc2;
            flaw = ckca__jpeg_frame(ctx, j, segment, length, picture);
            if (!flaw && (picture->height > CKCA__MAX_SIDE || picture->width > CKCA__MAX_SIDE ||
                          picture->height * picture->width > CKCA__MAX_PIXELS))
                return NULL;
        } else if (marker == 0xda) {
            if (!frame) return "corrupt: a scan before its frame header";
            if (j->components == 4 && j->adobe != 0 && j->adobe != 2)
                return "JPEG with 4 components needs an Adobe segment with transform 0 or 2";
            scanned = 1;
            flaw = ckca__jpeg_scan(j, segment, length);
            if (j->unfinished) break;
        } else if (marker == 0xe1) {
            if (!oriented && length > 6 && !memcmp(segment, "Exif\0", 6)) {
                picture->orientation = ckca__exif_orientation(segment + 6, length - 6);
                oriented = picture->orientation != 1;
            }
        } else if (marker == 0xee) {
            if (length >= 12 && !memcmp(segment, "Adobe", 6)) j->adobe = segment[11];
        } else if (marker == 0xdc) { /* DNL, the number of lines: must equal that of the frame */
            if (!scanned || length != 2 || (segment[0] << 8 | segment[1]) != picture->height)
                return "corrupt: its number of lines contradicts its frame header";
        } else if (!(marker >= 0xe0 && marker <= 0xef) && marker != 0xfe) {
            return marker == 0xf7                     ? "JPEG-LS is not supported"
                   : marker == 0xde || marker == 0xdf ? kinds[5]
                                                      : "corrupt: unknown or misplaced marker";
        }
    }
    /* no end marker: accept the file only if its data is complete */
    if (flaw || !scanned) return flaw ? flaw : ckca__truncated;
    for (i = 0; i < j->components; i++)
        if (j->component[i].exact != ~(uint64_t)0) return ckca__truncated;
    picture->end = j->scan_end;
    return NULL;
}
/* Validates a picture file; returns its flaw, or NULL. */
static const char *ckca__walk_picture(ckca_context *ctx, const unsigned char *bytes, size_t size,
                                      ckca__picture *picture) {
    static const unsigned char png[] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
    ckca__jpeg jpeg;
    const char *flaw;
    int read_codes, undecided, i;
    memset(picture, 0, sizeof *picture);
    picture->orientation = 1;
    if (size == 0) return "an empty file";
    if (size >= 8 && !memcmp(bytes, png, 8)) return ckca__walk_png(bytes, size, picture);
    if (size < 3 || bytes[0] != 0xff || bytes[1] != 0xd8 || bytes[2] != 0xff) return "neither JPEG nor PNG";
    for (read_codes = 0;; read_codes = 1) { /* reads the codes too if markers are not enough */
        memset(&jpeg, 0, sizeof jpeg);
        jpeg.bytes = bytes;
        jpeg.size = size;
        jpeg.adobe = -1;
        jpeg.read_codes = read_codes;
        flaw = ckca__jpeg_walk(ctx, &jpeg, picture);
        undecided = !flaw && !read_codes && (picture->end || jpeg.restarts);
        ckca__lock(ctx);
        for (i = 0; i < 4; i++) ckca__release(ctx, jpeg.component[i].nonzero);
        ckca__unlock(ctx);
        if (!undecided) return flaw;
    }
}
/* Checks that a picture file in memory can be decoded; path is for messages. */
static ckca_status ckca__check_picture(ckca_context *ctx, const char *path, const unsigned char *bytes, size_t size,
                                       ckca__picture *picture) {
    const char *flaw = ckca__walk_picture(ctx, bytes, size, picture);
    if (!flaw && size > INT_MAX - 1024) flaw = "too many bytes for stb_image";
    if (flaw)
        return ckca__fail(ctx, flaw == ckca__no_memory ? CKCA_ENOMEM : CKCA_EFORMAT, "%s: cannot be decoded: %s",
                          ckca__tail(path), flaw);
    if (picture->height < 1 || picture->width < 1 || picture->height > CKCA__MAX_SIDE ||
        picture->width > CKCA__MAX_SIDE || picture->height * picture->width > CKCA__MAX_PIXELS)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: %.0f x %.0f pixels, must have 1 to %d per side and at most %.0f",
                          ckca__tail(path), (double)picture->height, (double)picture->width, (int)CKCA__MAX_SIDE,
                          (double)CKCA__MAX_PIXELS);
    return CKCA_OK;
}
/* Decodes with stb_image into h x w x c bytes; on failure returns NULL, and *memory is 1 if memory ran out. The reason
   of stb_image is not enough: it may be missing (no memory to inflate a PNG, an unknown block type) or of another
   picture. */
static unsigned char *ckca__stb_load(const unsigned char *bytes, size_t size, int *h, int *w, int *c, int *memory) {
    unsigned char *pixels;
#ifdef CKCA__STB_COUNTED
    void *state = ckca__stb_malloc(1 << 15); /* as large as its own state: 2.26 does not check that allocation */
    *memory = !state;
    if (!state) return NULL;
    ckca__stb_free(state);
    ckca__stb_refused = 0;
    pixels = stbi_load_from_memory(bytes, (int)size, w, h, c, 0);
    *memory = ckca__stb_refused;
#else /* the program's own stb_image: provoke another failure first, so that the reason is of this picture */
    const char *reason;
    *memory = 0;
    pixels = stbi_load_from_memory(bytes, (int)size, w, h, c, 0);
    if (pixels || stbi_load_from_memory((const unsigned char *)"", 1, w, h, c, 0)) return pixels;
    pixels = stbi_load_from_memory(bytes, (int)size, w, h, c, 0);
    reason = stbi_failure_reason();
    *memory = reason && (strstr(reason, "f memory") || strstr(reason, "outofmem"));
#endif
    return pixels;
}
#ifdef CKCA_TURBOJPEG
/* Decodes a JPEG of *h x *w with TurboJPEG into *h x *w x *c bytes that ckca__release frees, reduced by *scale: 2, 4 or
   8 where the part (ys, xs) keeps at least the size that it is resized to, else 1. NULL: no memory (*memory is 1), or
   leave it to stb_image: CMYK, or anything that TurboJPEG as much as warns of. (TurboJPEG itself allocates for every
   picture.) */
static unsigned char *ckca__turbo_load(ckca_context *ctx, const unsigned char *bytes, size_t size, const ckca__span *ys,
                                       const ckca__span *xs, int *h, int *w, int *c, int *scale, int *memory) {
    tjhandle turbo = ckca__scratch_now && ckca__scratch_now->turbo ? ckca__scratch_now->turbo : tjInitDecompress();
    unsigned char *pixels = NULL;
    int subsampling, space, height, width;
    if (!turbo) return NULL;
    if (tjDecompressHeader3(turbo, bytes, (unsigned long)size, &width, &height, &subsampling, &space) == 0 &&
        height == *h && width == *w && (space == TJCS_GRAY || space == TJCS_YCbCr || space == TJCS_RGB)) {
        *c = space == TJCS_GRAY ? 1 : 3;
        for (*scale = 8;
             *scale > 1 && (ys->length < (double)*scale * ys->full || xs->length < (double)*scale * xs->full);)
            *scale /= 2;
        *h = (*h + *scale - 1) / *scale;
        *w = (*w + *scale - 1) / *scale;
        ckca__lock(ctx);
        pixels = (unsigned char *)ckca__alloc(ctx, (size_t)*h * (size_t)*w * (size_t)*c);
        ckca__unlock(ctx);
        *memory = !pixels;
        if (pixels && tjDecompress2(turbo, bytes, (unsigned long)size, pixels, *w, 0, *h,
                                    *c == 1 ? TJPF_GRAY : TJPF_RGB, TJFLAG_ACCURATEDCT)) {
            ckca__lock(ctx);
            ckca__release(ctx, pixels);
            ckca__unlock(ctx);
            pixels = NULL;
        }
    }
    if (!ckca__scratch_now)
        tjDestroy(turbo);
    else
        ckca__scratch_now->turbo = turbo;
    return pixels;
}
/* The same part in a picture reduced by scale, whose side has `size` values. */
static ckca__span ckca__span_reduced(ckca__span span, int scale, int size) {
    span.from /= scale;
    span.length /= scale;
    span.low /= scale;
    span.high = (span.high + scale - 1) / scale;
    if (span.high > size) span.high = size;
    return span;
}
#endif
/* Decodes a picture file in memory to what target describes: height x width x channels bytes. */
static ckca_status ckca__decode_to(ckca_context *ctx, const char *path, const unsigned char *bytes, size_t size,
                                   ckca__target *target, unsigned char *out) {
    ckca__picture picture;
    ckca__span ys, xs;
    int h = 0, w = 0, c = 0, memory = 0, fits, orientation, turned, reduced = 0;
    unsigned char *pixels = NULL, *whole = NULL;
    ckca_status status = ckca__check_picture(ctx, path, bytes, size, &picture);
    if (status) return status;
    orientation = target->as_stored ? 1 : picture.orientation;
    turned = orientation > 4;
    ckca__aim(target, (int)(turned ? picture.width : picture.height), (int)(turned ? picture.height : picture.width),
              &ys, &xs);
    if (picture.end || picture.rewritten) {
        ckca__lock(ctx);
        whole = (unsigned char *)ckca__alloc(ctx, picture.end ? picture.end + 2 : picture.rewritten);
        ckca__unlock(ctx);
        if (!whole) return ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory to copy it", ckca__tail(path));
        if (picture.end) { /* stb_image needs the end marker */
            memcpy(whole, bytes, picture.end);
            memcpy(whole + picture.end, "\xff\xd9", 2);
            size = picture.end + 2;
        } else {
            size = ckca__rewrite_png(bytes, size, whole);
        }
    }
#ifdef CKCA_TURBOJPEG
    if (bytes[0] == 0xff) {
        h = (int)picture.height;
        w = (int)picture.width;
        pixels = ckca__turbo_load(ctx, whole ? whole : bytes, size, &ys, &xs, &h, &w, &c, &reduced, &memory);
        if (pixels && reduced > 1) {
            ys = ckca__span_reduced(ys, reduced, turned ? w : h);
            xs = ckca__span_reduced(xs, reduced, turned ? h : w);
        }
        if (!pixels) reduced = 0;
    }
#endif
    if (!pixels && !memory) pixels = ckca__stb_load(whole ? whole : bytes, size, &h, &w, &c, &memory);
    ckca__lock(ctx);
    ckca__release(ctx, whole);
    ckca__unlock(ctx);
    if (!pixels && memory)
        return ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory to decode its %.0f x %.0f pixels", ckca__tail(path),
                          (double)picture.height, (double)picture.width);
    if (!pixels || (!reduced && (h != picture.height || w != picture.width))) {
        stbi_image_free(pixels);
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: cannot be decoded: corrupt: invalid pixel data", ckca__tail(path));
    }
    fits = ckca__resize(ctx, pixels, h, w, c, orientation, &ys, &xs, out, target->channels);
    if (reduced) {
        ckca__lock(ctx);
        ckca__release(ctx, pixels);
        ckca__unlock(ctx);
    } else {
        stbi_image_free(pixels);
    }
    if (!fits)
        return ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory to resize its %d x %d pixels", ckca__tail(path), h, w);
    return CKCA_OK;
}
/* Decodes a picture file in memory to height x width x channels bytes; as_stored: without its EXIF orientation. */
static ckca_status ckca__decode(ckca_context *ctx, const char *path, const unsigned char *bytes, size_t size,
                                unsigned char *out, int height, int width, int channels, int as_stored) {
    ckca__target target;
    memset(&target, 0, sizeof target);
    target.height = height;
    target.width = width;
    target.channels = channels;
    target.as_stored = as_stored;
    return ckca__decode_to(ctx, path, bytes, size, &target, out);
}
static void ckca__target_of_desc(ckca__target *target, const ckca_data_desc *desc) {
    memset(target, 0, sizeof *target);
    target->height = desc->height;
    target->width = desc->width;
    target->channels = desc->channels;
    target->short_side = desc->short_side;
    target->as_stored = desc->as_stored;
}
/* Checks the descriptor of a single picture. */
static ckca_status ckca__picture_desc(ckca_context *ctx, const ckca_data_desc *desc) {
    ckca_data_desc checked;
    ckca_status status = ckca__data_desc(ctx, desc, &checked);
    if (!status && (!desc->height || !desc->width || !desc->channels))
        status = ckca__fail(ctx, CKCA_EINVAL, "desc: height x width x channels is %d x %d x %d, all three must be set",
                            desc->height, desc->width, desc->channels);
    return status ? status : ckca__check_short_side(ctx, desc, desc->height, desc->width);
}
CKCA_API ckca_status ckca_read_picture_memory(ckca_context *ctx, const void *bytes, size_t size,
                                              const ckca_data_desc *desc, unsigned char *out) {
    ckca__target target;
    ckca_status status;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!bytes || !desc || !out)
        return ckca__null(ctx, "ckca_read_picture_memory", !bytes ? "bytes" : !desc ? "desc" : "out");
    status = ckca__picture_desc(ctx, desc);
    if (status) return status;
    ckca__target_of_desc(&target, desc);
    return ckca__decode_to(ctx, "the picture in memory", (const unsigned char *)bytes, size, &target, out);
}
#ifndef CKCA_NO_STDIO
enum { CKCA__MAX_PICTURE_FILE = 256 << 20 };
static ckca_status ckca__read_picture(ckca_context *ctx, const char *path, ckca__target *target, unsigned char *out) {
    unsigned char *bytes;
    size_t size;
    ckca_status status = ckca__read_file(ctx, path, CKCA__MAX_PICTURE_FILE, &bytes, &size);
    if (status) return status;
    status = ckca__decode_to(ctx, path, bytes, size, target, out);
    ckca__lock(ctx);
    ckca__release(ctx, bytes);
    ckca__unlock(ctx);
    return status;
}
CKCA_API ckca_status ckca_read_picture(ckca_context *ctx, const char *path, const ckca_data_desc *desc,
                                       unsigned char *out) {
    ckca__target target;
    ckca_status status;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!path || !desc || !out) return ckca__null(ctx, "ckca_read_picture", !path ? "path" : !desc ? "desc" : "out");
    status = ckca__picture_desc(ctx, desc);
    if (status) return status;
    ckca__target_of_desc(&target, desc);
    return ckca__read_picture(ctx, path, &target, out);
}
#ifdef CKCA__POSIX
typedef struct ckca__files {
    char **path;
    size_t count, capacity;
} ckca__files;
static void ckca__files_free(ckca_context *ctx, ckca__files *files) {
    while (files->count) ckca__release(ctx, files->path[--files->count]);
    ckca__release(ctx, files->path);
}
/* Kind of a file by its name. SYSTEM: a file that the operating system adds. */
typedef enum ckca__name_kind { CKCA__NAME_PICTURE, CKCA__NAME_OTHER, CKCA__NAME_SYSTEM } ckca__name_kind;
static ckca__name_kind ckca__file_kind(const char *name) {
    static const char *const endings[] = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", "Thumbs.db", "desktop.ini"};
    size_t length = strlen(name), i, j;
    for (i = 0; i < 7; i++) {
        size_t n = strlen(endings[i]);
        if (i < 5 ? length <= n : length != n) continue;
        for (j = 0; j < n && (name[length - n + j] | 0x20) == (endings[i][j] | 0x20); j++) {
        }
        if (j == n) return i < 5 ? CKCA__NAME_PICTURE : CKCA__NAME_SYSTEM;
    }
    return CKCA__NAME_OTHER;
}
static int ckca__compare_paths(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }
#ifndef __cplusplus /* strict C99 hides this POSIX function */
extern int lstat(const char *, struct stat *);
#endif
/* 1 if the folder at path is a link to the data folder top or to one above it: the pictures of all classes are there. */
static int ckca__leads_above(const char *path, const struct stat *folder, const char *top) {
    char up[4096]; /* top/../.. */
    size_t n = strlen(top);
    struct stat about, last;
    if (lstat(path, &about) != 0 || !S_ISLNK(about.st_mode) || n >= sizeof up) return 0;
    memcpy(up, top, n + 1);
    memset(&last, 0, sizeof last);
    while (stat(up, &about) == 0) {
        if (about.st_dev == folder->st_dev && about.st_ino == folder->st_ino) return 1;
        if (about.st_dev == last.st_dev && about.st_ino == last.st_ino) break; /* the root is its own parent */
        last = about;
        if (sizeof up - n < 4) break;
        memcpy(up + n, "/..", 4);
        n += 3;
    }
    return 0;
}
/* Adds the folders or the pictures in dir to a list, sorted by the bytes of their paths, without hidden ones. *left_out
   counts the files that are neither, and links to top, the data folder, or to a folder above it. */
static ckca_status ckca__list(ckca_context *ctx, const char *dir, const char *top, int folders, ckca__files *files,
                              int *left_out) {
    size_t first = files->count;
    struct dirent *entry;
    struct stat about;
    ckca_status status = CKCA_OK;
    DIR *open_dir = opendir(dir);
    if (!open_dir) return ckca__fail(ctx, CKCA_EIO, "%s: cannot be opened: %s", ckca__tail(dir), strerror(errno));
    for (;;) {
        char *path;
        ckca__name_kind kind;
        errno = 0;
        entry = readdir(open_dir);
        if (!entry) break;
        if (entry->d_name[0] == '.') continue;
        kind = ckca__file_kind(entry->d_name);
        if (kind == CKCA__NAME_SYSTEM) continue;
        path = ckca__path(ctx, dir, entry->d_name);
        if (path) { /* a folder may be named like a picture */
            int is_folder = stat(path, &about) == 0 && S_ISDIR(about.st_mode);
            int above = is_folder && ckca__leads_above(path, &about, top);
            if (folders ? !is_folder || above : is_folder || kind != CKCA__NAME_PICTURE) {
                *left_out += !is_folder || above;
                ckca__release(ctx, path);
                continue;
            }
        }
        if (!path || !ckca__grow(ctx, (void **)&files->path, files->count, &files->capacity, sizeof *files->path)) {
            ckca__release(ctx, path);
            status = ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory for a list of %.0f files", ckca__tail(dir),
                                (double)files->count + 1);
            break;
        }
        files->path[files->count++] = path;
    }
    if (!status && errno)
        status = ckca__fail(ctx, CKCA_EIO, "%s: cannot be read: %s", ckca__tail(dir), strerror(errno));
    closedir(open_dir);
    if (!status && files->count > first)
        qsort(files->path + first, files->count - first, sizeof *files->path, ckca__compare_paths);
    return status;
}
enum { CKCA__MAX_DEPTH = 32 }; /* levels of folders below a class folder */
typedef struct ckca__visited { /* a folder, to recognise it on a second path */
    uint64_t device, inode;
    int depth; /* below the class folder; -1: visited before */
} ckca__visited;
/* Adds the pictures of a class folder and all folders below it to a list: folder by folder, sorted by the bytes of
   their paths, as in torchvision's ImageFolder. A folder that several links lead to is read once; top: as in
   ckca__list. */
static ckca_status ckca__list_class(ckca_context *ctx, const char *class_dir, const char *top_dir, ckca__files *files,
                                    int *left_out) {
    ckca__files folders;
    ckca__visited *visited = NULL;
    struct stat about;
    size_t i = 0, j, kept, capacity = 0;
    int none = 0;
    char *top = ckca__path(ctx, class_dir, "");
    ckca_status status = CKCA_OK;
    memset(&folders, 0, sizeof folders);
    if (top) top[strlen(class_dir)] = 0;
    if (top && ckca__grow(ctx, (void **)&folders.path, 0, &folders.capacity, sizeof *folders.path)) {
        folders.path[folders.count++] = top;
    } else {
        ckca__release(ctx, top);
        status = ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory for its path", ckca__tail(class_dir));
    }
    for (; !status && i < folders.count; i++) { /* the loop itself appends to folders */
        ckca__visited here;
        if (stat(folders.path[i], &about) != 0) {
            status =
                ckca__fail(ctx, CKCA_EIO, "%s: cannot be opened: %s", ckca__tail(folders.path[i]), strerror(errno));
            break;
        }
        here.device = (uint64_t)about.st_dev;
        here.inode = (uint64_t)about.st_ino;
        here.depth = 0;
        for (j = 0; j < i && (visited[j].device != here.device || visited[j].inode != here.inode); j++) {
        }
        if (j == i) {
            size_t length = strlen(class_dir);
            const char *at;
            for (at = folders.path[i] + length; *at; at++) here.depth += *at == '/';
            if (here.depth > CKCA__MAX_DEPTH)
                status = ckca__fail(ctx, CKCA_EINVAL, "%s: more than %d folders deep", ckca__tail(folders.path[i]),
                                    (int)CKCA__MAX_DEPTH);
            else
                status = ckca__list(ctx, folders.path[i], top_dir, 1, &folders, &none);
        } else {
            here.depth = -1;
        }
        if (!status && !ckca__grow(ctx, (void **)&visited, i, &capacity, sizeof *visited))
            status =
                ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory for %.0f folders", ckca__tail(class_dir), (double)i + 1);
        if (!status) visited[i] = here;
    }
    for (i = kept = 0; !status && i < folders.count; i++) {
        if (visited[i].depth >= 0)
            folders.path[kept++] = folders.path[i];
        else
            ckca__release(ctx, folders.path[i]);
    }
    if (!status) {
        folders.count = kept;
        qsort(folders.path, kept, sizeof *folders.path, ckca__compare_paths);
    }
    for (i = 0; !status && i < folders.count; i++)
        status = ckca__list(ctx, folders.path[i], top_dir, 0, files, left_out);
    ckca__release(ctx, visited);
    ckca__files_free(ctx, &folders);
    return status;
}
/* Reads a file that must be as it was when its set was opened. The caller releases *bytes. */
static ckca_status ckca__read_source(ckca_context *ctx, const ckca__source *source, unsigned char **bytes) {
    const char *path = ckca__tail(source->path);
    struct stat about;
    size_t got = 0;
    ssize_t more = 1;
    ckca_status status = CKCA_OK;
    int file = open(source->path, O_RDONLY | O_NONBLOCK); /* a pipe would block otherwise */
    *bytes = NULL;
    if (file < 0) return ckca__fail(ctx, CKCA_EIO, "%s: cannot be opened: %s", path, strerror(errno));
    if (fstat(file, &about) != 0)
        status = ckca__fail(ctx, CKCA_EIO, "%s: cannot be read: %s", path, strerror(errno));
    else if (!S_ISREG(about.st_mode))
        status = ckca__fail(ctx, CKCA_EIO, "%s: not a regular file", path);
    else if ((uint64_t)about.st_size != source->size || (int64_t)about.st_mtime != source->time)
        status =
            ckca__fail(ctx, CKCA_EIO,
                       "%s: has changed since its set was opened: then %.0f bytes, time %.0f; now %.0f bytes, time "
                       "%.0f",
                       path, (double)source->size, (double)source->time, (double)about.st_size, (double)about.st_mtime);
    if (!status) {
        ckca__lock(ctx);
        *bytes = (unsigned char *)ckca__alloc(ctx, source->size + 1);
        ckca__unlock(ctx);
        if (!*bytes)
            status = ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory for its %.0f bytes", path, (double)source->size);
    }
    while (!status && more > 0 && got < source->size) {
        more = read(file, *bytes + got, source->size - got);
        if (more > 0) got += (size_t)more;
        if (more < 0 && errno == EINTR) more = 1;
    }
    close(file);
    if (!status && got < source->size)
        status = ckca__fail(ctx, CKCA_EIO, "%s: reading stopped after %.0f of %.0f bytes", path, (double)got,
                            (double)source->size);
    if (status) {
        ckca__lock(ctx);
        ckca__release(ctx, *bytes);
        ckca__unlock(ctx);
        *bytes = NULL;
    }
    return status;
}
/* Size and time of a picture's file. */
static ckca_status ckca__source_stat(ckca_context *ctx, ckca__source *source) {
    struct stat about;
    if (stat(source->path, &about) != 0)
        return ckca__fail(ctx, CKCA_EIO, "%s: cannot be opened: %s", ckca__tail(source->path), strerror(errno));
    if (!S_ISREG(about.st_mode)) return ckca__fail(ctx, CKCA_EIO, "%s: not a regular file", ckca__tail(source->path));
    if ((uint64_t)about.st_size > CKCA__MAX_PICTURE_FILE)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: has %.0f bytes, the limit is %.0f", ckca__tail(source->path),
                          (double)about.st_size, (double)CKCA__MAX_PICTURE_FILE);
    source->size = (size_t)about.st_size;
    source->time = (int64_t)about.st_mtime;
    return CKCA_OK;
}
typedef struct ckca__decode_job {
    ckca_context *ctx;
    ckca__store *store;
    ckca_storage storage;
    unsigned char *unreadable; /* 1: file i was skipped. NULL: none may be skipped */
    int failed;                /* first file in the list that failed; store->count: none */
    ckca_status failure;
    size_t *held; /* COMPRESSED: where in store->held each file goes */
} ckca__decode_job;
/* COMPRESSED: keeps the bytes of a picture's file. */
static ckca_status ckca__hold_source(ckca_context *ctx, ckca__source *source, unsigned char *held) {
    unsigned char *bytes;
    ckca__picture picture;
    ckca_status status = ckca__read_source(ctx, source, &bytes);
    if (status) return status;
    status = ckca__check_picture(ctx, source->path, bytes, source->size, &picture);
    if (!status) memcpy(held, bytes, source->size);
    ckca__lock(ctx);
    ckca__release(ctx, bytes);
    ckca__unlock(ctx);
    source->bytes = held;
    return status;
}
static void ckca__decode_one(void *job, int i, int thread) {
    ckca__decode_job *a = (ckca__decode_job *)job;
    const ckca__store *store = a->store;
    ckca__source *source = &store->source[i];
    ckca__target target;
    ckca_context own; /* a copy with an error text of its own */
    ckca_status status;
    int skip;
    (void)thread;
    ckca__lock(a->ctx);
    own = *a->ctx;
    skip = i > a->failed && a->failure;
    ckca__unlock(a->ctx);
    if (skip) return;
    if (a->storage == CKCA_STORAGE_DECODED) {
        memset(&target, 0, sizeof target);
        target.height = store->height;
        target.width = store->width;
        target.channels = store->channels;
        target.short_side = source->short_side;
        target.as_stored = source->as_stored;
        ckca__source_stat(&own, source); /* a failure is reported below */
        status =
            ckca__read_picture(&own, source->path, &target, store->pixels + (size_t)i * ckca__picture_bytes(store));
        source->resized = target.resized;
    } else if (a->held) {
        status = ckca__hold_source(&own, source, store->held + a->held[i]);
    } else {
        status = ckca__source_stat(&own, source);
    }
    if (!status) return;
    ckca__lock(a->ctx);
    if (a->unreadable && status != CKCA_ENOMEM) {
        a->unreadable[i] = 1;
        status = CKCA_OK;
    }
    if (status ? i < a->failed || !a->failure : i < a->failed && !a->failure) {
        a->failed = i;
        a->failure = status;
        memcpy(a->ctx->error, own.error, sizeof own.error);
    }
    ckca__unlock(a->ctx);
}
/* One pass over the files in parallel: decodes them into the store, or reads their bytes (held: their places), or only
   their sizes and times. Of several failures the first in the list is reported. skip: unreadable files are removed from
   the store, which counts them and keeps the first one's message. */
static ckca_status ckca__decode_pass(ckca_context *ctx, ckca__store *store, ckca_storage storage, int skip,
                                     size_t *held) {
    ckca__decode_job job;
    size_t size = ckca__picture_bytes(store);
    int i, kept = 0;
    memset(&job, 0, sizeof job);
    job.ctx = ctx;
    job.store = store;
    job.storage = storage;
    job.held = held;
    job.failed = store->count;
    job.unreadable = skip ? (unsigned char *)ckca__alloc(ctx, (size_t)store->count) : NULL;
    if (skip && !job.unreadable) return ckca__fail(ctx, CKCA_ENOMEM, "no memory for %d flags", store->count);
    ckca__parallel(ctx, store->count, ckca__decode_one, &job);
    if (!job.failure && job.failed < store->count) {
        for (i = 0; i < store->count; i++) {
            if (job.unreadable[i]) continue;
            if (kept < i && store->pixels)
                memcpy(store->pixels + (size_t)kept * size, store->pixels + (size_t)i * size, size);
            store->source[kept] = store->source[i];
            store->labels[kept++] = store->labels[i];
        }
        store->unreadable += store->count - kept;
        store->count = kept;
        if (kept == 0)
            job.failure = CKCA_EFORMAT; /* ctx->error is the first one's message */
        else if (!ckca__keep_message(store))
            job.failure = ckca__fail(ctx, CKCA_ENOMEM, "no memory for a message");
        else
            ctx->error[0] = 0;
    }
    ckca__release(ctx, job.unreadable);
    return job.failure;
}
/* Gives a new store its sources, the files in this order, and reads what its storage needs. */
static ckca_status ckca__decode_all(ckca_context *ctx, const ckca__files *files, ckca__store *store,
                                    ckca_storage storage, const ckca_data_desc *desc) {
    size_t bytes = 0, *held;
    int i;
    ckca_status status;
    for (i = 0; i < store->count; i++) bytes = ckca__sum(bytes, strlen(files->path[i]) + 1);
    store->source = (ckca__source *)ckca__alloc(ctx, (size_t)store->count * sizeof *store->source);
    store->paths = (char *)ckca__alloc(ctx, bytes);
    if (!store->source || !store->paths)
        return ckca__fail(ctx, CKCA_ENOMEM, "no memory for the paths of %d pictures", store->count);
    for (i = 0, bytes = 0; i < store->count; i++) {
        ckca__source *source = &store->source[i];
        const size_t length = strlen(files->path[i]) + 1;
        source->path = (const char *)memcpy(store->paths + bytes, files->path[i], length);
        source->short_side = desc->short_side;
        source->as_stored = desc->as_stored;
        source->skip_unreadable = desc->skip_unreadable;
        source->resized = 1; /* of DECODED pictures, decoding tells */
        bytes += length;
    }
    status = ckca__decode_pass(ctx, store, storage, desc->skip_unreadable, NULL);
    if (!status && storage == CKCA_STORAGE_COMPRESSED) {
        const double budget = (desc->budget_mb ? desc->budget_mb : CKCA__BUDGET_MB) * 1048576.0;
        held = (size_t *)ckca__alloc(ctx, (size_t)store->count * sizeof *held);
        for (i = 0, bytes = 0; held && i < store->count; i++) {
            held[i] = bytes;
            bytes = ckca__sum(bytes, store->source[i].size);
        }
        if ((double)bytes > budget)
            status = ckca__fail(ctx, CKCA_EINVAL,
                                "%d files take %.1f MiB in memory, budget_mb of ckca_data_desc allows %.0f",
                                store->count, (double)bytes / 1048576.0, budget / 1048576.0);
        else if (!held || !(store->held = (unsigned char *)ckca__alloc(ctx, bytes)))
            status =
                ckca__fail(ctx, CKCA_ENOMEM, "no memory for the %.0f bytes of %d files", (double)bytes, store->count);
        if (!status) status = ckca__decode_pass(ctx, store, storage, desc->skip_unreadable, held);
        ckca__release(ctx, held);
    }
    for (i = 0; !status && i < store->count; i++) store->resized |= store->source[i].resized;
    return status;
}
/* How a folder or list of count pictures is kept: what desc says, or what fits its budget. */
static ckca_status ckca__choose_storage(ckca_context *ctx, const char *path, size_t count, int height, int width,
                                        const ckca_data_desc *desc, ckca_storage *storage) {
    const double bytes = (double)(desc->height ? desc->height : height) * (desc->width ? desc->width : width) *
                         (desc->channels ? desc->channels : 3) * (double)count;
    const double budget = (desc->budget_mb ? desc->budget_mb : CKCA__BUDGET_MB) * 1048576.0;
    *storage = desc->storage ? desc->storage : bytes <= budget ? CKCA_STORAGE_DECODED : CKCA_STORAGE_STREAM;
    if (*storage != CKCA_STORAGE_DECODED || bytes <= budget) return CKCA_OK;
    return ckca__fail(
        ctx, CKCA_EINVAL,
        "%s: its %.0f pictures take %.1f MiB decoded, budget_mb of ckca_data_desc allows %.0f: raise it, or "
        "set storage to CKCA_STORAGE_STREAM",
        ckca__tail(path), (double)count, bytes / 1048576.0, budget / 1048576.0);
}
/* The size of the first picture that can be read, unless desc gives it; if none can, ckca__decode_all reports the
   first. */
static ckca_status ckca__first_size(ckca_context *ctx, const ckca__files *files, const ckca_data_desc *desc,
                                    int *height, int *width) {
    unsigned char *bytes;
    ckca__picture first;
    size_t size, i;
    ckca_status status = CKCA_OK;
    for (i = 0; !status && i < files->count && (!desc->height || !desc->width); i++) {
        status = ckca__read_file(ctx, files->path[i], CKCA__MAX_PICTURE_FILE, &bytes, &size);
        if (!status) {
            unsigned char pixel[3];
            status = ckca__check_picture(ctx, files->path[i], bytes, size, &first);
            if (!status && desc->skip_unreadable) /* its data may be corrupt all the same */
                status = ckca__decode(ctx, files->path[i], bytes, size, pixel, 1, 1, 3, 1);
            ckca__release(ctx, bytes);
        }
        if (!status) {
            int swap = first.orientation > 4 && !desc->as_stored;
            *height = (int)(swap ? first.width : first.height);
            *width = (int)(swap ? first.height : first.width);
            if ((int64_t)*height * *width > CKCA__MAX_DEFAULT_PIXELS && !desc->height && !desc->width)
                status = ckca__fail(
                    ctx, CKCA_EINVAL,
                    "%s: as the first picture it gives the set its size, but %d x %d is too large: set height "
                    "and width of ckca_data_desc (in the programs: --size)",
                    ckca__tail(files->path[i]), *height, *width);
            break;
        }
        if (desc->skip_unreadable && status != CKCA_ENOMEM) status = CKCA_OK;
    }
    return status;
}
/* Error: a folder is not one of the requested classes. The message lists these, and the bytes of a name that is not
   ASCII, since Unicode has several encodings of the same letter. */
static ckca_status ckca__not_a_class(ckca_context *ctx, const char *path, const char *name,
                                     const ckca_data_desc *desc) {
    char list[160], escaped[80];
    size_t at = 0, i;
    int k, ascii = 1;
    for (k = 0; k < desc->classes; k++) {
        size_t n = strlen(desc->class_names[k]);
        if (at + n + 10 > sizeof list) break;
        at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", k ? ", " : "", desc->class_names[k]);
    }
    snprintf(list + at, sizeof list - at, "%s", k == desc->classes ? "" : k ? ", ..." : "...");
    for (i = at = 0; name[i] && at + 5 < sizeof escaped; i++) {
        unsigned char c = (unsigned char)name[i];
        if (c >= 128) ascii = 0;
        at += (size_t)snprintf(escaped + at, sizeof escaped - at, c < 128 ? "%c" : "\\x%02x", c);
    }
    return ckca__fail(ctx, CKCA_EINVAL, "%.200s: not one of the %d requested classes: %s%s%s%s",
                      strlen(path) > 200 ? path + (strlen(path) - 200) : path, desc->classes, list,
                      ascii ? "" : " (names are compared byte by byte; the folder's name is ", ascii ? "" : escaped,
                      ascii ? "" : ")");
}
/* A class name must be UTF-8, as checkpoints are. */
static ckca_status ckca__check_class_name(ckca_context *ctx, const char *dir, const char *name) {
    char escaped[160];
    size_t flaw = ckca__utf8_flaw((const unsigned char *)name, strlen(name));
    if (!name[flaw]) return CKCA_OK;
    ckca__escape(name, escaped, sizeof escaped);
    return ckca__fail(ctx, CKCA_EINVAL, "%s: the name of its class folder \"%s\" is not UTF-8: rename it",
                      ckca__tail(dir), escaped);
}
CKCA_API ckca_status ckca_open_folder(ckca_context *ctx, ckca_data **data, const char *dir,
                                      const ckca_data_desc *desc_or_null) {
    ckca__files folders, files;
    ckca_data_desc desc;
    ckca__store *store = NULL;
    const char **names = NULL; /* the names of the class folders */
    size_t *end = NULL, i, j;  /* files[end[i - 1]..end[i]) are of folder i */
    int height = 1, width = 1, left_out = 0, decoded;
    ckca_storage storage = CKCA_STORAGE_AUTO;
    ckca_status status = ckca__open(ctx, data, dir, CKCA_PART_TRAIN, desc_or_null, &desc);
    if (status) return status;
    memset(&folders, 0, sizeof folders);
    memset(&files, 0, sizeof files);
    status = ckca__list(ctx, dir, dir, 1, &folders, &left_out);
    if (!status && folders.count == 0) status = ckca__fail(ctx, CKCA_EINVAL, "%s: no class folders", ckca__tail(dir));
    if (!status && desc.classes && !desc.class_names && (size_t)desc.classes != folders.count)
        status = ckca__fail(ctx, CKCA_EINVAL, "%s: has %.0f class folders, but %d classes were requested",
                            ckca__tail(dir), (double)folders.count, desc.classes);
    if (!status) {
        names = (const char **)ckca__alloc(ctx, folders.count * sizeof *names);
        end = (size_t *)ckca__alloc(ctx, folders.count * sizeof *end);
        if (!names || !end) status = ckca__fail(ctx, CKCA_ENOMEM, "no memory for %.0f classes", (double)folders.count);
    }
    for (i = 0; !status && i < folders.count; i++) {
        names[i] = strrchr(folders.path[i], '/') + 1;
        status = ckca__check_class_name(ctx, dir, names[i]);
        if (!status && desc.class_names && ckca__find_name(desc.class_names, desc.classes, names[i]) < 0)
            status = ckca__not_a_class(ctx, folders.path[i], names[i], &desc);
        if (!status) status = ckca__list_class(ctx, folders.path[i], dir, &files, &left_out);
        end[i] = files.count;
        if (!status && !desc.class_names && end[i] == (i ? end[i - 1] : 0))
            status = ckca__fail(ctx, CKCA_EINVAL, "%s: no .jpg, .jpeg, .jpe, .jfif or .png file",
                                ckca__tail(folders.path[i]));
    }
    if (!status && files.count == 0)
        status = ckca__fail(ctx, CKCA_EINVAL, "%s: no .jpg, .jpeg, .jpe, .jfif or .png file in its class folders",
                            ckca__tail(dir));
    if (!status) status = ckca__first_size(ctx, &files, &desc, &height, &width);
    if (!status) status = ckca__choose_storage(ctx, dir, files.count, height, width, &desc, &storage);
    decoded = storage == CKCA_STORAGE_DECODED;
    if (!status && desc.class_names)
        status =
            ckca__store_new(ctx, &store, files.count, height, width, 3, desc.classes, desc.class_names, &desc, decoded);
    else if (!status)
        status = ckca__store_new(ctx, &store, files.count, height, width, 3, (int)folders.count, names, &desc, decoded);
    for (i = 0; !status && i < folders.count; i++)
        for (j = i ? end[i - 1] : 0; j < end[i]; j++)
            store->labels[j] = desc.class_names ? ckca__find_name(desc.class_names, desc.classes, names[i]) : (int)i;
    if (!status) status = ckca__decode_all(ctx, &files, store, storage, &desc);
    for (i = j = 0; !status && !desc.class_names && i < folders.count; i++) { /* labels ascend, as the folders do */
        if (j == (size_t)store->count || store->labels[j] != (int)i)
            status = ckca__fail(ctx, CKCA_EINVAL, "%s: none of its %.0f pictures can be read",
                                ckca__tail(folders.path[i]), (double)(end[i] - (i ? end[i - 1] : 0)));
        while (!status && j < (size_t)store->count && store->labels[j] == (int)i) j++;
    }
    if (!status) store->left_out = left_out;
    if (!status) status = ckca__view(data, store, NULL, store->count);
    ckca__store_release(store);
    ckca__release(ctx, names);
    ckca__release(ctx, end);
    ckca__files_free(ctx, &folders);
    ckca__files_free(ctx, &files);
    return status;
}
/* Parses line number `line` of a list, text[0..length) of `PATH<TAB>LABEL`: appends the path to files. */
static ckca_status ckca__parse_line(ckca_context *ctx, const char *list, double line, char *text, size_t length,
                                    const ckca_data_desc *desc, ckca__files *files, int *label) {
    const size_t folder = strrchr(list, '/') ? (size_t)(strrchr(list, '/') - list) + 1 : 0;
    char *tab = (char *)memchr(text, '\t', length), *path, *at;
    size_t n;
    long value = 0;
    if (length && text[length - 1] == '\r') length--;
    if (memchr(text, 0, length))
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: line %.0f has a zero byte", ckca__tail(list), line);
    if (!tab || tab == text || tab + 1 >= text + length)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: line %.0f is not PATH<TAB>LABEL", ckca__tail(list), line);
    for (at = tab + 1; at < text + length && *at >= '0' && *at <= '9' && value <= CKCA__CLASSES_MAX; at++)
        value = 10 * value + (*at - '0');
    if (at < text + length && value <= CKCA__CLASSES_MAX)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: line %.0f: its label is not a number from 0", ckca__tail(list), line);
    if (value >= (desc->classes ? desc->classes : CKCA__CLASSES_MAX))
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: line %.0f: its label is %.20s, there are %d classes",
                          ckca__tail(list), line, tab + 1, desc->classes ? desc->classes : (int)CKCA__CLASSES_MAX);
    *label = (int)value;
    n = (size_t)(tab - text);
    path = (char *)ckca__alloc(ctx, folder + n + 1);
    if (!path || !ckca__grow(ctx, (void **)&files->path, files->count, &files->capacity, sizeof *files->path)) {
        ckca__release(ctx, path);
        return ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory for line %.0f", ckca__tail(list), line);
    }
    if (text[0] == '/') {
        memcpy(path, text, n);
    } else {
        memcpy(path, list, folder);
        memcpy(path + folder, text, n);
    }
    files->path[files->count++] = path;
    return CKCA_OK;
}
CKCA_API ckca_status ckca_open_list(ckca_context *ctx, ckca_data **data, const char *list,
                                    const ckca_data_desc *desc_or_null) {
    ckca__files files;
    ckca_data_desc desc;
    ckca__store *store = NULL;
    ckca_storage storage = CKCA_STORAGE_AUTO;
    unsigned char *bytes = NULL;
    int *labels = NULL, height = 1, width = 1, classes = 0;
    size_t size = 0, at, end, capacity = 0;
    double line = 0;
    ckca_status status = ckca__open(ctx, data, list, CKCA_PART_TRAIN, desc_or_null, &desc);
    if (status) return status;
    memset(&files, 0, sizeof files);
    status = ckca__read_file(ctx, list, (size_t)1 << 30, &bytes, &size);
    for (at = 0; !status && at < size; at = end + 1) {
        int label = 0;
        for (end = at; end < size && bytes[end] != '\n'; end++) continue;
        bytes[end] = 0; /* there is one byte more than size */
        line++;
        if (end == at || (end == at + 1 && bytes[at] == '\r')) continue;
        status = ckca__parse_line(ctx, list, line, (char *)bytes + at, end - at, &desc, &files, &label);
        if (!status && !ckca__grow(ctx, (void **)&labels, files.count - 1, &capacity, sizeof *labels))
            status = ckca__fail(ctx, CKCA_ENOMEM, "%s: no memory for line %.0f", ckca__tail(list), line);
        if (status) break;
        labels[files.count - 1] = label;
        if (label >= classes) classes = label + 1;
    }
    ckca__release(ctx, bytes);
    if (desc.classes) classes = desc.classes;
    if (!status && files.count == 0)
        status = ckca__fail(ctx, CKCA_EINVAL, "%s: lists no pictures", ckca__tail(list));
    if (!status) status = ckca__first_size(ctx, &files, &desc, &height, &width);
    if (!status) status = ckca__choose_storage(ctx, list, files.count, height, width, &desc, &storage);
    if (!status)
        status = ckca__store_new(ctx, &store, files.count, height, width, 3, classes, desc.class_names, &desc,
                                 storage == CKCA_STORAGE_DECODED);
    if (!status) {
        memcpy(store->labels, labels, files.count * sizeof *labels);
        status = ckca__decode_all(ctx, &files, store, storage, &desc);
    }
    if (!status) status = ckca__view(data, store, NULL, store->count);
    ckca__store_release(store);
    ckca__release(ctx, labels);
    ckca__files_free(ctx, &files);
    return status;
}
#else
CKCA_API ckca_status ckca_open_list(ckca_context *ctx, ckca_data **data, const char *list,
                                    const ckca_data_desc *desc_or_null) {
    ckca_data_desc desc;
    ckca_status status = ckca__open(ctx, data, list, CKCA_PART_TRAIN, desc_or_null, &desc);
    return status ? status : ckca__fail(ctx, CKCA_EIO, "%s: ckca_open_list needs POSIX", ckca__tail(list));
}
CKCA_API ckca_status ckca_open_folder(ckca_context *ctx, ckca_data **data, const char *dir,
                                      const ckca_data_desc *desc_or_null) {
    ckca_data_desc desc;
    ckca_status status = ckca__open(ctx, data, dir, CKCA_PART_TRAIN, desc_or_null, &desc);
    return status ? status : ckca__fail(ctx, CKCA_EIO, "%s: ckca_open_folder needs POSIX", ckca__tail(dir));
}
#endif /* CKCA__POSIX */
#endif /* CKCA_NO_STDIO */
#else  /* CKCA_NO_STB_IMAGE: the calls still link, but fail with a message */
CKCA_API ckca_status ckca_read_picture_memory(ckca_context *ctx, const void *bytes, size_t size,
                                              const ckca_data_desc *desc, unsigned char *out) {
    (void)bytes, (void)size, (void)desc, (void)out;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    return ckca__fail(ctx, CKCA_EINVAL, "ckca_read_picture_memory: built without JPEG and PNG (CKCA_NO_STB_IMAGE)");
}
#ifndef CKCA_NO_STDIO
CKCA_API ckca_status ckca_open_folder(ckca_context *ctx, ckca_data **data, const char *dir,
                                      const ckca_data_desc *desc) {
    ckca_data_desc checked;
    ckca_status status = ckca__open(ctx, data, dir, CKCA_PART_TRAIN, desc, &checked);
    if (status) return status;
    return ckca__fail(ctx, CKCA_EINVAL, "%s: built without JPEG and PNG (CKCA_NO_STB_IMAGE)", ckca__tail(dir));
}
CKCA_API ckca_status ckca_open_list(ckca_context *ctx, ckca_data **data, const char *path, const ckca_data_desc *desc) {
    return ckca_open_folder(ctx, data, path, desc);
}
CKCA_API ckca_status ckca_read_picture(ckca_context *ctx, const char *path, const ckca_data_desc *desc,
                                       unsigned char *out) {
    (void)desc;
    (void)out;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!path) return ckca__null(ctx, "ckca_read_picture", "path");
    return ckca__fail(ctx, CKCA_EINVAL, "%s: built without JPEG and PNG (CKCA_NO_STB_IMAGE)", ckca__tail(path));
}
#endif /* CKCA_NO_STDIO */
#endif /* CKCA_NO_STB_IMAGE */

/* --- Splitting ---------------------------------------------------------------------------------------------------- */

/* The Fisher-Yates shuffle: all orders are equally likely. */
static void ckca__shuffle_split(uint64_t seed, int *index, int n) {
    int i;
    for (i = n - 1; i > 0; i--) {
        int j = (int)(ckca__random(seed, CKCA__STREAM_SPLIT, (uint64_t)i) % ((uint64_t)i + 1)), swap = index[j];
        index[j] = index[i];
        index[i] = swap;
    }
}

/* How many pictures of each class a stratified choice of total out of n has: total * have[k] / n rounded down, plus one
   for the classes with the largest remainders. have, quota: classes. */
static void ckca__quota(const int *have, int classes, int n, int total, int *quota) {
    int k, given = 0;
    for (k = 0; k < classes; k++) given += quota[k] = (int)((int64_t)total * have[k] / n);
    for (; given < total; given++) {
        int best = -1;
        int64_t most = -1;
        for (k = 0; k < classes; k++) {
            int64_t remainder = (int64_t)total * have[k] - (int64_t)quota[k] * n;
            if (remainder > most) {
                most = remainder;
                best = k;
            }
        }
        quota[best]++; /* its remainder is now negative */
    }
}

CKCA_API ckca_status ckca_split(const ckca_data *data, int n, const ckca_split_desc *desc, ckca_data **parts) {
    ckca_split_desc none;
    ckca_context *ctx;
    ckca__bound bounds[3] = {{"n", 0, 1, INT_MAX, 0}, {"size", 0, 0, INT_MAX, 0}, {"stratified", 0, 0, 1, 0}};
    ckca_data **made;                  /* n: the parts; copied to parts when all exist */
    int *order, *dealt, *have, *quota; /* count: shuffled; part after part; classes: per class */
    int i, j, k, count, total, classes;
    ckca_status status = CKCA_OK;
    memset(&none, 0, sizeof none);
    if (!data) return CKCA_EINVAL;
    ctx = data->store->ctx;
    count = data->count;
    classes = data->store->classes;
    if (!desc) desc = &none;
    if (!parts) return ckca__null(ctx, "ckca_split", "parts");
    bounds[0].value = n;
    bounds[1].value = desc->size;
    bounds[2].value = desc->stratified;
    if ((status = ckca__check_bounds(ctx, "ckca_split", bounds, 3))) return status;
    if ((int64_t)n * (desc->size ? desc->size : 1) > count)
        return ckca__fail(ctx, CKCA_EINVAL, "%d parts of %d pictures need %.0f pictures, there are %d", n,
                          desc->size ? desc->size : 1, (double)n * (desc->size ? desc->size : 1), count);
    total = desc->size ? n * desc->size : count;
    made = (ckca_data **)ckca__alloc(ctx, (size_t)n * sizeof *made);
    order = (int *)ckca__alloc(ctx, ckca__mul(sizeof(int), 2 * (size_t)count + 2 * (size_t)classes));
    if (!made || !order) {
        ckca__release(ctx, made);
        ckca__release(ctx, order);
        return ckca__fail(ctx, CKCA_ENOMEM, "no memory to split %d pictures", count);
    }
    dealt = order + count;
    have = dealt + count;
    quota = have + classes;
    for (i = 0; i < count; i++) order[i] = data->index[i];
    ckca__shuffle_split(desc->seed, order, count);
    if (desc->stratified) { /* choose by class, sorted by class */
        for (i = 0; i < count; i++) have[data->store->labels[order[i]]]++;
        ckca__quota(have, classes, count, total, quota);
        for (k = 0, j = 0; k < classes; j += quota[k++]) have[k] = j; /* first position of class k */
        for (i = 0; i < count; i++) {
            k = data->store->labels[order[i]];
            if (quota[k]-- > 0) dealt[have[k]++] = order[i];
        }
        memcpy(order, dealt, (size_t)total * sizeof *order);
    }
    /* dealt like cards: between parts, sizes and class counts differ by at most one */
    for (i = 0, j = 0; i < n; i++)
        for (k = i; k < total; k += n) dealt[j++] = order[k];
    for (i = 0, j = 0; i < n && !status; i++) {
        int size = total / n + (i < total % n);
        status = ckca__view(&made[i], data->store, dealt + j, size);
        j += size;
    }
    for (i = 0; i < n; i++) {
        if (status)
            ckca_data_free(made[i]);
        else
            parts[i] = made[i];
    }
    ckca__release(ctx, made);
    ckca__release(ctx, order);
    return status;
}

/* Chooses the pictures to hold out. position (data->count values, or NULL) begins with their *held positions in data,
   class by class, and ends with the *train positions of the pictures to train on, in their order. */
static ckca_status ckca__choose_holdout(const ckca_data *data, float fraction, uint64_t seed, int *position, int *held,
                                        int *train) {
    const ckca__store *store = data->store;
    const int count = data->count;
    /* of each picture of the store: 1: it is in data, 2: it is held out */
    unsigned char *mark = (unsigned char *)ckca__alloc(store->ctx, (size_t)store->count);
    int *order = (int *)ckca__alloc(store->ctx, ckca__mul(sizeof(int), 2 * (size_t)count + (size_t)store->classes + 1));
    int *sorted = order + count, *end = sorted + count; /* end[k + 1]: end of class k in sorted */
    int i, k, distinct = 0, spare = 0, size, at = 0, left = 0;
    if (!mark || !order) {
        ckca__release(store->ctx, mark);
        ckca__release(store->ctx, order);
        return ckca__fail(store->ctx, CKCA_ENOMEM, "no memory to hold out some of %d pictures", count);
    }
    for (i = 0; i < count; i++) order[i] = i;
    for (i = count - 1; i > 0; i--) { /* Fisher-Yates */
        const int j = (int)(ckca__random(seed, CKCA__STREAM_HOLDOUT, (uint64_t)i) % ((uint64_t)i + 1)), swap = order[j];
        order[j] = order[i];
        order[i] = swap;
    }
    for (i = 0; i < count; i++) { /* without repeats */
        const int picture = data->index[order[i]];
        if (mark[picture]) continue;
        mark[picture] = 1;
        order[distinct++] = order[i];
        end[store->labels[picture] + 1]++;
    }
    for (k = 0; k < store->classes; k++) {
        spare += end[k + 1] ? end[k + 1] - 1 : 0; /* all but one of each class */
        end[k + 1] += end[k];
    }
    for (i = 0; i < distinct; i++) sorted[end[store->labels[data->index[order[i]]]]++] = order[i];
    size = (int)((double)fraction * distinct + 0.5);
    if (size > spare) size = spare;
    for (i = k = 0; i < distinct; i++) { /* evenly spread over the spare ones: every class in proportion */
        const int picture = data->index[sorted[i]];
        if (i == 0 || store->labels[picture] != store->labels[data->index[sorted[i - 1]]]) continue;
        if ((int64_t)(k + 1) * size / spare > (int64_t)k * size / spare) {
            mark[picture] = 2;
            if (position) position[at] = sorted[i];
            at++;
        }
        k++;
    }
    for (i = count - 1; i >= 0; i--) {
        if (mark[data->index[i]] == 2) continue;
        left++;
        if (position) position[count - left] = i;
    }
    *held = at;
    *train = left;
    ckca__release(store->ctx, mark);
    ckca__release(store->ctx, order);
    return CKCA_OK;
}

CKCA_API ckca_status ckca_holdout(const ckca_data *data, float fraction, uint64_t seed, ckca_data **train,
                                  ckca_data **held) {
    ckca__bound bound = {"fraction", 0, 0, 0.9, 0};
    ckca_context *ctx;
    ckca_data *kept = NULL, *rest = NULL;
    int *position, n = 0, left = 0;
    ckca_status status;
    if (!data) return CKCA_EINVAL;
    ctx = data->store->ctx;
    if (!train || !held) return ckca__null(ctx, "ckca_holdout", !train ? "train" : "held");
    bound.value = (double)fraction;
    if ((status = ckca__check_bounds(ctx, "ckca_holdout", &bound, 1))) return status;
    position = (int *)ckca__alloc(ctx, (size_t)data->count * sizeof *position);
    if (!position) return ckca__fail(ctx, CKCA_ENOMEM, "no memory to hold out some of %d pictures", data->count);
    status = ckca__choose_holdout(data, fraction, seed, position, &n, &left);
    if (!status && n < 1)
        status = ckca__fail(ctx, CKCA_EINVAL,
                            "a hold-out of %g of %d pictures is none (one of every class stays for training)",
                            (double)fraction, data->count);
    if (!status) status = ckca_subset(&kept, data, position, n);
    if (!status) status = ckca_subset(&rest, data, position + (data->count - left), left);
    ckca__release(ctx, position);
    if (status) {
        ckca_data_free(kept);
        return status;
    }
    *held = kept;
    *train = rest;
    return CKCA_OK;
}

CKCA_API ckca_status ckca_subset(ckca_data **subset, const ckca_data *data, const int *index, int n) {
    ckca_context *ctx;
    ckca_status status;
    int i;
    ckca__bound bound = {"n", 0, 1, INT_MAX, 0};
    if (!data) return CKCA_EINVAL;
    ctx = data->store->ctx;
    if (!subset || !index) return ckca__null(ctx, "ckca_subset", !subset ? "subset" : "index");
    bound.value = n;
    if ((status = ckca__check_bounds(ctx, "ckca_subset", &bound, 1))) return status;
    for (i = 0; i < n; i++)
        if (index[i] < 0 || index[i] >= data->count)
            return ckca__fail(ctx, CKCA_EINVAL, "ckca_subset: index[%d] is %d, there are %d pictures", i, index[i],
                              data->count);
    status = ckca__view(subset, data->store, index, n);
    for (i = 0; !status && i < n; i++) (*subset)->index[i] = data->index[index[i]];
    return status;
}

static int ckca__has_sources(ckca_data *const *parts, int n) {
    int i;
    for (i = 0; i < n && !parts[i]->store->source;) i++;
    return i < n;
}
/* Joins sets of different stores, some with files: the new store has their sources; files on disk are not read. */
static ckca_status ckca__join_sources(ckca_data **joined, ckca_data *const *parts, int n, int total) {
    const ckca__store *first = parts[0]->store;
    ckca_context *ctx = first->ctx;
    const size_t picture = ckca__picture_bytes(first);
    size_t paths = 0, held = 0;
    ckca__store *store = NULL;
    ckca_data_desc none;
    ckca_status status;
    int i, j, at, decoded = 1;
    memset(&none, 0, sizeof none);
    for (i = 0; i < n; i++) decoded = decoded && parts[i]->store->pixels;
    status = ckca__store_new(ctx, &store, (size_t)total, first->height, first->width, first->channels, first->classes,
                             (const char *const *)first->class_names, &none, decoded);
    if (status) return status;
    for (i = 0; i < n; i++) {
        for (j = 0; j < parts[i]->count; j++) {
            const int k = parts[i]->index[j];
            const ckca__source *from = parts[i]->store->source ? &parts[i]->store->source[k] : NULL;
            if (from && from->path) paths = ckca__sum(paths, strlen(from->path) + 1);
            if (from && from->bytes)
                held = ckca__sum(held, from->size);
            else if (!decoded && ckca__raw(parts[i]->store, k))
                held = ckca__sum(held, picture);
        }
    }
    store->source = (ckca__source *)ckca__alloc(ctx, (size_t)total * sizeof *store->source);
    store->paths = (char *)ckca__alloc(ctx, paths);
    store->held = (unsigned char *)ckca__alloc(ctx, held);
    if (!store->source || !store->paths || !store->held) {
        ckca__store_release(store);
        return ckca__fail(ctx, CKCA_ENOMEM, "ckca_join: no memory for %d pictures (%.0f bytes)", total,
                          (double)held + (double)paths);
    }
    for (i = 0, at = 0, paths = held = 0; i < n; i++) {
        const ckca__store *old = parts[i]->store;
        for (j = 0; j < parts[i]->count; j++, at++) {
            const int k = parts[i]->index[j];
            const unsigned char *raw = ckca__raw(old, k);
            ckca__source *to = &store->source[at];
            if (old->source) *to = old->source[k];
            to->unreadable = 0;
            to->raw = NULL;
            store->resized |= to->resized;
            store->labels[at] = old->labels[k];
            if (to->path) {
                const size_t length = strlen(to->path) + 1;
                to->path = (const char *)memcpy(store->paths + paths, to->path, length);
                paths += length;
            }
            if (to->bytes) {
                to->bytes = (const unsigned char *)memcpy(store->held + held, to->bytes, to->size);
                held += to->size;
            } else if (raw && decoded) {
                memcpy(store->pixels + (size_t)at * picture, raw, picture);
            } else if (raw) {
                to->raw = (const unsigned char *)memcpy(store->held + held, raw, picture);
                held += picture;
            }
        }
    }
    status = ckca__view(joined, store, NULL, total);
    ckca__store_release(store);
    return status;
}

CKCA_API ckca_status ckca_join(ckca_data **joined, ckca_data *const *parts, int n) {
    ckca_context *ctx;
    ckca__store *first, *store;
    ckca_data_desc desc;
    size_t total = 0, bytes;
    int i, j, k, at = 0, shared = 1;
    ckca_status status;
    ckca_data *view = NULL;
    for (i = 0; parts && i < n && !parts[i];) i++;
    if (!parts || i >= n) return CKCA_EINVAL; /* no part has a context for an error */
    first = parts[i]->store;
    ctx = first->ctx;
    if (!joined) return ckca__null(ctx, "ckca_join", "joined");
    for (i = 0; i < n; i++) {
        if (!parts[i]) return ckca__fail(ctx, CKCA_EINVAL, "ckca_join: parts[%d] is NULL", i);
        store = parts[i]->store;
        if (store->ctx != ctx)
            return ckca__fail(ctx, CKCA_EINVAL, "ckca_join: parts[%d] belongs to another context than parts[0]", i);
        total += (size_t)parts[i]->count;
        shared = shared && store == first;
        if (store->height != first->height || store->width != first->width || store->channels != first->channels)
            return ckca__fail(ctx, CKCA_ESHAPE, "parts[%d] has pictures of %d x %d x %d, parts[0] of %d x %d x %d", i,
                              store->height, store->width, store->channels, first->height, first->width,
                              first->channels);
        if (store->classes != first->classes)
            return ckca__fail(ctx, CKCA_ESHAPE, "parts[%d] has %d classes, parts[0] %d", i, store->classes,
                              first->classes);
        for (k = 0; store != first && k < first->classes; k++)
            if (strcmp(store->class_names[k], first->class_names[k]))
                return ckca__fail(ctx, CKCA_EINVAL, "class %d is \"%.100s\" in parts[%d], \"%.100s\" in parts[0]", k,
                                  store->class_names[k], i, first->class_names[k]);
    }
    if (total > INT_MAX)
        return ckca__fail(ctx, CKCA_EINVAL, "%.0f pictures, a data set has at most %d", (double)total, INT_MAX);
    memset(&desc, 0, sizeof desc);
    store = first;
    if (shared)
        first->refs++;
    else if (ckca__has_sources(parts, n))
        return ckca__join_sources(joined, parts, n, (int)total);
    else {
        status = ckca__store_create(ctx, &store, total, first->height, first->width, first->channels, first->classes,
                                    (const char *const *)first->class_names, &desc);
        if (status) return status;
    }
    status = ckca__view(&view, store, NULL, (int)total);
    bytes = ckca__picture_bytes(store);
    for (i = 0; !status && i < n; i++) {
        for (j = 0; j < parts[i]->count; j++, at++) {
            if (shared)
                view->index[at] = parts[i]->index[j];
            else {
                store->labels[at] = ckca_label(parts[i], j);
                memcpy(store->pixels + (size_t)at * bytes, ckca_pixels(parts[i], j), bytes);
            }
        }
    }
    ckca__store_release(store);
    if (!status) *joined = view;
    return status;
}

/* ===================================================================================================================
   STREAM                                                                                                     >>stream

   Pictures that are not held decoded, read ahead of the trainer.

   A feed is a ring of batches. Its plan, a function, tells which batch comes next; decoder threads make the pictures of
   the coming batches, in any order, while the trainer works on the one that it took last. What the trainer asks for
   decides: if that is not what was planned, the ring is emptied and filled anew, so the plan changes only the speed.
   A picture depends on (seed, epoch, index) alone, so that its bits do not depend on threads, plan or form. The crop of
   resized_crop is cut here, from the full-size picture; ckca__op_batch does the rest of augmentation, as ever.
   Nothing is allocated per batch (but see ckca__scratch). Without threads, taking a batch decodes it.
   =================================================================================================================== */

/* In THREADS: threads that run a function of their own, a lock and two conditions. */
static struct ckca__crew *ckca__crew_new(ckca_context *ctx, int threads);
static int ckca__crew_start(struct ckca__crew *crew, void *(*run)(void *job), void *jobs, size_t job_bytes);
static void ckca__crew_free(ckca_context *ctx, struct ckca__crew *crew);
static void ckca__crew_lock(struct ckca__crew *crew);
static void ckca__crew_unlock(struct ckca__crew *crew);
static void ckca__crew_wait(struct ckca__crew *crew, int done);
static void ckca__crew_wake(struct ckca__crew *crew, int done);

enum { CKCA__FEED_BATCHES = 4 }; /* in the ring; without threads 1 */

/* 1: batches of this store need a feed. */
static int ckca__needs_feed(const ckca__store *store, const ckca_augment *augment) {
    return !store->pixels || (store->source && store->resized && augment && augment->resized_crop);
}

/* Makes picture i of the store: height x width x channels bytes, augmented by resized_crop only. *cropped: 1 if it was
   applied; else ckca__op_batch applies it, as it does to decoded pictures. */
static ckca_status ckca__load_picture(ckca_context *ctx, const ckca__store *store, int i, const ckca_augment *augment,
                                      uint64_t seed, int epoch, unsigned char *out, unsigned char *cropped) {
    const ckca__source *source = &store->source[i];
    const unsigned char *raw = ckca__raw(store, i);
    *cropped = 0;
    if (raw && !(augment && augment->resized_crop && source->resized && source->path)) {
        memcpy(out, raw, ckca__picture_bytes(store));
        return CKCA_OK;
    }
#if !defined(CKCA_NO_STB_IMAGE) && !defined(CKCA_NO_STDIO) && defined(CKCA__POSIX)
    {
        ckca__target target;
        unsigned char *bytes = NULL;
        ckca_status status = CKCA_OK;
        memset(&target, 0, sizeof target);
        target.height = store->height;
        target.width = store->width;
        target.channels = store->channels;
        target.short_side = source->short_side;
        target.as_stored = source->as_stored;
        target.augment = augment;
        target.seed = seed;
        target.epoch = epoch;
        target.index = i;
        if (!source->bytes && (status = ckca__read_source(ctx, source, &bytes))) return status;
        status = ckca__decode_to(ctx, source->path, source->bytes ? source->bytes : bytes, source->size, &target, out);
        *cropped = (unsigned char)target.cropped;
        ckca__lock(ctx);
        ckca__release(ctx, bytes);
        ckca__unlock(ctx);
        return status;
    }
#else
    (void)seed, (void)epoch;
    return ckca__fail(ctx, CKCA_EINVAL, "built without files"); /* never: no store has sources then */
#endif
}

typedef struct ckca__feed_batch {
    unsigned char *pixels;   /* size x height x width x channels */
    int *position;           /* size: which pictures of the data set. Of an unreadable one: of its substitute */
    unsigned char *cropped;  /* size: see ckca__load_picture */
    unsigned char *bad;      /* size: 1: unreadable, and skip_unreadable is set */
    int n, epoch;            /* pictures; of the augmentation */
    int claimed, finished;   /* pictures that decoders have begun and finished */
    int failed;              /* the first unreadable picture, n: none */
    ckca_status failure;     /* of that picture; CKCA_OK: it may be skipped */
    char error[sizeof(((ckca_context *)0)->error)];
} ckca__feed_batch;
typedef struct ckca__decoder {
    struct ckca__feed *feed;
    ckca_context own; /* a copy with an error text and memory of its own */
    ckca__scratch scratch;
} ckca__decoder;
typedef struct ckca__feed {
    ckca_context *ctx;
    const ckca_data *data;
    const ckca_augment *augment;
    uint64_t seed;
    /* Writes the positions of the batch after the last planned one, and its epoch; returns their number, 0: none. */
    int (*plan)(void *user, int *position, int *epoch);
    void *user;
    struct ckca__crew *crew; /* guards what follows; NULL: no threads */
    int decoders, stop;
    ckca__decoder *decoder; /* at least 1 */
    void *block;            /* memory of the batches */
    int size, depth;        /* pictures per batch, batches in the ring */
    int64_t head, tail;     /* batches [head, tail) are in the ring, k at batch[k % depth] */
    int taken;              /* 1: the trainer works on the first one */
    double waited;          /* seconds that taking batches took */
    ckca__feed_batch batch[CKCA__FEED_BATCHES];
} ckca__feed;

/* Makes picture i of a batch. The lock is not held. */
static ckca_status ckca__feed_decode(ckca__decoder *d, ckca__feed_batch *b, int i) {
    const ckca__feed *feed = d->feed;
    const ckca__store *store = feed->data->store;
    ckca_status status;
    ckca__scratch_reset(&d->scratch);
#ifndef CKCA_NO_STB_IMAGE
    ckca__scratch_now = &d->scratch;
#endif
    status = ckca__load_picture(&d->own, store, feed->data->index[b->position[i]], feed->augment, feed->seed, b->epoch,
                                b->pixels + (size_t)i * ckca__picture_bytes(store), &b->cropped[i]);
#ifndef CKCA_NO_STB_IMAGE
    ckca__scratch_now = NULL;
#endif
    return status;
}

/* Notes what became of picture i. Of several unreadable ones the first counts, but one that may not be skipped before
   those that may. The lock is held. */
static void ckca__feed_note(ckca__decoder *d, ckca__feed_batch *b, int i, ckca_status status) {
    const ckca_data *data = d->feed->data;
    if (status && status != CKCA_ENOMEM && data->store->source[data->index[b->position[i]]].skip_unreadable) {
        b->bad[i] = 1;
        if (i < b->failed && !b->failure) {
            b->failed = i;
            memcpy(b->error, d->own.error, sizeof b->error);
        }
    } else if (status && (i < b->failed || !b->failure)) {
        b->failed = i;
        b->failure = status;
        memcpy(b->error, d->own.error, sizeof b->error);
    }
    b->finished++;
}

static void *ckca__decoder_run(void *job) {
    ckca__decoder *d = (ckca__decoder *)job;
    ckca__feed *feed = d->feed;
    ckca__crew_lock(feed->crew);
    while (!feed->stop) {
        ckca__feed_batch *b = NULL;
        ckca_status status;
        int64_t k;
        int i;
        for (k = feed->head; k < feed->tail && !b; k++)
            if (feed->batch[k % feed->depth].claimed < feed->batch[k % feed->depth].n) b = &feed->batch[k % feed->depth];
        if (!b) {
            ckca__crew_wait(feed->crew, 0);
            continue;
        }
        i = b->claimed++;
        ckca__crew_unlock(feed->crew);
        status = ckca__feed_decode(d, b, i);
        ckca__crew_lock(feed->crew);
        ckca__feed_note(d, b, i, status);
        if (b->finished == b->n) ckca__crew_wake(feed->crew, 1);
    }
    ckca__crew_unlock(feed->crew);
    return NULL;
}

static void ckca__feed_free(ckca__feed *feed) {
    int i;
    if (!feed) return;
    if (feed->crew) {
        ckca__crew_lock(feed->crew);
        feed->stop = 1;
        ckca__crew_wake(feed->crew, 0);
        ckca__crew_unlock(feed->crew);
        ckca__crew_free(feed->ctx, feed->crew);
    }
    for (i = 0; feed->decoder && i < feed->decoders; i++) {
        free(feed->decoder[i].scratch.block);
#if defined(CKCA_TURBOJPEG) && !defined(CKCA_NO_STB_IMAGE)
        if (feed->decoder[i].scratch.turbo) tjDestroy(feed->decoder[i].scratch.turbo);
#endif
    }
    ckca__release(feed->ctx, feed->decoder);
    ckca__release(feed->ctx, feed->block);
    ckca__release(feed->ctx, feed);
}

/* Opens a feed of batches of up to size pictures of data and starts its threads, as many as the context has; none for a
   context of one. plan may be NULL. augment stays the caller's. */
static ckca_status ckca__feed_open(ckca_context *ctx, ckca__feed **out, const ckca_data *data, int size,
                                   const ckca_augment *augment, uint64_t seed,
                                   int (*plan)(void *user, int *position, int *epoch), void *user) {
    const size_t pixels = ckca__round_up(ckca__mul(ckca__picture_bytes(data->store), (size_t)size), CKCA__ALIGN);
    const size_t n = (size_t)size, row = ckca__round_up(ckca__mul(n, sizeof(int) + 2), CKCA__ALIGN);
    ckca__feed *feed = (ckca__feed *)ckca__alloc(ctx, sizeof *feed);
    size_t bytes;
    char *at;
    int i;
    if (!feed) return ckca__fail(ctx, CKCA_ENOMEM, "no memory to read batches of %d pictures", size);
    feed->ctx = ctx;
    feed->data = data;
    feed->augment = augment;
    feed->seed = seed;
    feed->plan = plan;
    feed->user = user;
    feed->size = size;
    feed->decoders = ctx->threads;
    feed->crew = ctx->threads > 1 ? ckca__crew_new(ctx, ctx->threads) : NULL;
    feed->depth = feed->crew ? CKCA__FEED_BATCHES : 1;
    bytes = ckca__mul((size_t)feed->depth, ckca__sum(pixels, row));
    feed->decoder = (ckca__decoder *)ckca__alloc(ctx, (size_t)feed->decoders * sizeof *feed->decoder);
    feed->block = ckca__alloc(ctx, bytes);
    if (!feed->decoder || !feed->block || (ctx->threads > 1 && !feed->crew && ctx->pool)) {
        ckca__feed_free(feed);
        return ckca__fail(ctx, CKCA_ENOMEM, "no memory to read batches of %d pictures (%.0f bytes)", size,
                          (double)bytes);
    }
    for (i = 0, at = (char *)feed->block; i < feed->depth; i++, at += pixels + row) {
        feed->batch[i].pixels = (unsigned char *)at;
        feed->batch[i].position = (int *)(void *)(at + pixels);
        feed->batch[i].cropped = (unsigned char *)(at + pixels + n * sizeof(int));
        feed->batch[i].bad = feed->batch[i].cropped + n;
    }
    for (i = 0; i < feed->decoders; i++) {
        ckca__decoder *d = &feed->decoder[i];
        d->feed = feed;
        d->own = *ctx;
        d->own.pool = NULL; /* its memory needs no lock */
        d->own.alloc = ckca__scratch_alloc;
        d->own.release = ckca__scratch_release;
        d->own.user = &d->scratch;
    }
    if (feed->crew && !ckca__crew_start(feed->crew, ckca__decoder_run, feed->decoder, sizeof *feed->decoder)) {
        ckca__crew_free(ctx, feed->crew); /* no thread could be created */
        feed->crew = NULL;
        feed->depth = 1;
    }
    *out = feed;
    return CKCA_OK;
}

/* Puts a batch into the ring, whose positions are in its place already. */
static void ckca__feed_put(ckca__feed *feed, int n, int epoch) {
    ckca__feed_batch *b = &feed->batch[feed->tail++ % feed->depth];
    memset(b->bad, 0, (size_t)n);
    b->n = b->failed = n;
    b->epoch = epoch;
    b->claimed = b->finished = 0;
    b->failure = CKCA_OK;
    if (feed->crew) ckca__crew_wake(feed->crew, 0);
}

/* Gives unreadable pictures, which may be skipped, their substitutes: the readable picture before each, or the first. */
static ckca_status ckca__feed_substitute(ckca__feed *feed, ckca__feed_batch *b) {
    ckca__store *store = feed->data->store;
    const size_t picture = ckca__picture_bytes(store);
    int i, good = 0;
    memcpy(feed->ctx->error, b->error, sizeof b->error);
    while (good < b->n && b->bad[good]) good++;
    if (good == b->n) return CKCA_EFORMAT; /* none of the batch can be read; the message is the first one's */
    ckca__keep_message(store);
    feed->ctx->error[0] = 0;
    for (i = 0; i < b->n; i++) {
        ckca__source *source = &store->source[feed->data->index[b->position[i]]];
        if (!b->bad[i]) {
            good = i;
            continue;
        }
        store->unreadable += !source->unreadable;
        source->unreadable = 1;
        memcpy(b->pixels + (size_t)i * picture, b->pixels + (size_t)good * picture, picture);
        b->position[i] = b->position[good];
        b->cropped[i] = b->cropped[good];
    }
    return CKCA_OK;
}

/* Waits for the batch of the pictures position[0..n) in this epoch's augmentation. *out is valid until the next call. */
static ckca_status ckca__feed_take(ckca__feed *feed, const int *position, int n, int epoch, ckca__feed_batch **out) {
    const double start = ckca__seconds();
    ckca__feed_batch *b;
    int64_t k;
    int i, next;
    if (feed->crew) ckca__crew_lock(feed->crew);
    if (feed->taken) feed->head++;
    feed->taken = 0;
    while (feed->plan && feed->tail - feed->head < feed->depth &&
           (i = feed->plan(feed->user, feed->batch[feed->tail % feed->depth].position, &next)) > 0)
        ckca__feed_put(feed, i, next);
    b = &feed->batch[feed->head % feed->depth];
    if (feed->head == feed->tail || b->n != n || b->epoch != epoch ||
        memcmp(b->position, position, (size_t)n * sizeof *position)) { /* not as planned: start again with this batch */
        for (k = feed->head; k < feed->tail; k++) feed->batch[k % feed->depth].n = feed->batch[k % feed->depth].claimed;
        for (k = feed->head; k < feed->tail; k++)
            while (feed->crew && feed->batch[k % feed->depth].finished < feed->batch[k % feed->depth].n)
                ckca__crew_wait(feed->crew, 1);
        feed->tail = feed->head;
        memcpy(b->position, position, (size_t)n * sizeof *position);
        ckca__feed_put(feed, n, epoch);
    }
    if (!feed->crew)
        for (i = 0; i < n; i++) ckca__feed_note(feed->decoder, b, i, ckca__feed_decode(feed->decoder, b, i));
    while (b->finished < b->n) ckca__crew_wait(feed->crew, 1);
    feed->taken = 1;
    feed->waited += ckca__seconds() - start;
    if (feed->crew) ckca__crew_unlock(feed->crew);
    *out = b;
    if (b->failure) {
        memcpy(feed->ctx->error, b->error, sizeof b->error);
        return b->failure;
    }
    return b->failed < b->n ? ckca__feed_substitute(feed, b) : CKCA_OK;
}

/* A plan: pictures 0 to count - 1 in order. */
typedef struct ckca__sequence {
    int next, count, size, stride; /* size: of a batch; stride: from one batch to the next */
} ckca__sequence;
static int ckca__plan_sequence(void *user, int *position, int *epoch) {
    ckca__sequence *s = (ckca__sequence *)user;
    int n = s->count - s->next < s->size ? s->count - s->next : s->size, i;
    if (n <= 0) return 0;
    for (i = 0; i < n; i++) position[i] = s->next + i;
    s->next += s->stride;
    *epoch = 0;
    return n;
}

CKCA_API ckca_status ckca_copy_pixels(const ckca_data *data, int i, unsigned char *out) {
    ckca_context *ctx;
    const unsigned char *raw;
    unsigned char cropped;
    if (!data) return CKCA_EINVAL;
    ctx = data->store->ctx;
    if (!out) return ckca__null(ctx, "ckca_copy_pixels", "out");
    if (i < 0 || i >= data->count)
        return ckca__fail(ctx, CKCA_EINVAL, "ckca_copy_pixels: i is %d, there are %d pictures", i, data->count);
    raw = ckca__raw(data->store, data->index[i]);
    if (!raw) return ckca__load_picture(ctx, data->store, data->index[i], NULL, 0, 0, out, &cropped);
    memcpy(out, raw, ckca__picture_bytes(data->store));
    return CKCA_OK;
}

/* ===================================================================================================================
   MODEL                                                                                                       >>model

   Layers and their parameters, the ResNets, the graph as text.

   A model is a list of nodes in the order in which they were added, so every node comes after its inputs. The forward
   pass walks the list, the backward pass walks it in reverse. ckca_model_finish fuses neighbours that run as one op:
   batch norm (+ add) (+ ReLU) always; in evaluation also the convolution before it, with the batch norm folded into its
   weights. The last node of such a group, its tail, runs the op and owns the output.
   =================================================================================================================== */

typedef enum ckca__kind {
    CKCA__KIND_INPUT = 0,
    CKCA__KIND_CONV,
    CKCA__KIND_BATCHNORM,
    CKCA__KIND_RELU,
    CKCA__KIND_ADD,
    CKCA__KIND_MAXPOOL,
    CKCA__KIND_AVGPOOL,
    CKCA__KIND_SUBSAMPLE,
    CKCA__KIND_LINEAR,
    CKCA__KIND_GROUPNORM,
    CKCA__KIND_COUNT
} ckca__kind;

/* The name of each kind in the graph's text (see ckca__graph_write) and in messages. */
static const char *const ckca__kind_name[CKCA__KIND_COUNT] = {"input",   "conv",    "bn",        "relu",   "add",
                                                              "maxpool", "avgpool", "subsample", "linear", "gn"};

enum { CKCA__NAME_MAX = 64, CKCA__NODES_MAX = 10000, CKCA__BATCH_MAX = 1000000, CKCA__MODES = 8 };
#define CKCA__VALUES_MAX ((size_t)1 << 30) /* in one node's output per picture, and in one parameter */

typedef struct ckca__node {
    ckca__kind kind;
    int in[2];               /* input nodes, -1: none */
    int h, w, c;             /* shape of the output, per picture */
    int kernel, stride, pad; /* convolution, pooling; stride also for subsample */
    int bias;                /* convolution: 1: it has one */
    int groups;              /* group norm; convolution: 0: not grouped */
    int zero;                /* batch norm: 1: gamma starts at 0 */
    float rate;              /* the factor of the learning rate; 0: frozen */
    int constant;            /* 1: frozen, or without parameters, and its inputs too: runs as in evaluation */
    int evaluates;           /* convolution: 1: its batch norm's tail is constant and runs it folded, in training too */
    int stage;               /* 1: marked by ckca_layer_stage */
    int readers;             /* number of nodes that read it, plus one for logits and for features */
    int tensor;              /* index of its first parameter: weight (gamma), bias (beta), running_mean, running_var */
    int bf16;                /* 1: output and gradient are bfloat16, see ckca__choose_bf16 */
    int fused;               /* 1: a later tail runs it */
    int folded;              /* convolution: 1: in evaluation the batch norm's tail runs it */
    int takes;               /* convolution: the batch norm tail whose statistics it computes in training; 0: none */
    /* Of a tail: */
    int head;     /* its batch norm, or -1 */
    int source;   /* the node that it reads */
    int residual; /* the node that it adds, or -1 */
    int relu;     /* 1: it ends with a ReLU */
    /* Offsets per picture in floats, in the memory plan of each mode: */
    size_t value[CKCA__MODES], grad[CKCA__MODES];
    size_t side[CKCA__MODES]; /* what forward saves for backward beside the output, see ckca__layer */
    size_t backward_value;    /* during a backward pass: offset of its output, saved or recomputed */
    size_t packed_weights;    /* convolution: offset in model->packed_weights, in bytes */
    size_t saved;             /* batch norm: offset in model->saved of mean, then inv_std, C floats each */
    /* Of a batch norm's tail: 1: its reader normalises, see ckca__is_fused_into_reader. */
    int fused_into_reader[CKCA__MODES];
    ckca__norm norm; /* batch norm's tail: the statistics of this forward pass */
    int has_grad;    /* during a backward pass: 1: its gradient has a value to add to */
    char name[CKCA__NAME_MAX];
} ckca__node;

typedef enum ckca__role {
    CKCA__ROLE_WEIGHT = 0,
    CKCA__ROLE_BIAS,
    CKCA__ROLE_GAMMA,
    CKCA__ROLE_BETA,
    CKCA__ROLE_MEAN,
    CKCA__ROLE_VAR
} ckca__role;

/* An output that the backward pass recomputes, see MEMORY PLAN. */
typedef struct ckca__recompute {
    int node, before; /* recompute node's output before the backward of node before */
    int intermediate; /* 1: needed only to recompute others, which may overwrite it */
    int last_use;     /* the last moment at which it may be read; -1: it has been overwritten */
    int buffer_of;    /* the item whose buffer holds it (itself if it has its own) */
    int buffer_end;   /* the last use of the buffer that it owns */
    size_t offset;    /* per picture, in floats */
} ckca__recompute;

typedef struct ckca__parameter {
    char name[CKCA__NAME_MAX + 16];
    ckca__role role;
    int node;
    int dims, shape[4];   /* in PyTorch's order: K x C x R x S, K x D or C */
    size_t count, offset; /* values, and where they start in the arenas of values and folded weights, in floats */
    size_t slot;          /* where they start in the arenas of gradients and momentum, which have no frozen ones */
} ckca__parameter;

/* The training state of a finished update. It stays on disk until ckca_save has written the result. */
typedef struct ckca__unsaved {
    struct ckca__unsaved *next;
    char *state, *lock; /* paths, stored after this struct */
} ckca__unsaved;

/* Numbers of pictures in checkpoints are at most this; larger ones are no longer counted. */
#define CKCA__COUNT_MAX INT64_C(999999999999999)

/* The mean feature of every class, for FeatReg's CENTROID, in one block of host memory. */
typedef struct ckca__centroids {
    int64_t *count; /* classes: pictures behind each mean; NULL: there are no means */
    float *mean;    /* classes x features; zeros where count is 0 */
} ckca__centroids;

struct ckca_model {
    ckca_context *ctx;
    ckca_status failed; /* the first error of a ckca_layer_... call */
    char failure[256];  /* its message */
    int finished;
    char arch[32];
    int height, width, channels, classes, features, updates;
    uint64_t seed;
    int64_t pictures;          /* distinct pictures that the updates trained on; 0: not known */
    ckca__centroids centroids; /* of those pictures, by the network as each update left it */
    int64_t batches_tracked;   /* number of training forward passes: PyTorch's num_batches_tracked */
    int known;                 /* number of classes before ckca_add_classes, until the next update; 0: all */
    char **class_names;        /* classes strings, or NULL */
    float *normalization;      /* channels means, then channels standard deviations, of values 0 to 1 */
    int normalized;            /* 1: normalization is set */

    ckca__node *node;
    int nodes, logits, pooled; /* number of nodes; index of the logits' node and of the features' node */
    ckca__parameter *parameter;
    int parameters;
    size_t node_capacity, parameter_capacity;
    size_t decayed, trainable, all;  /* floats: weights with decay; these and all trainable ones; these and buffers */
    size_t trained;                  /* floats of gradients and of momentum: the trainable ones that are not frozen */
    size_t trained_decayed;          /* the first of them: weights with decay */
    size_t saved_count;              /* size of saved, in floats */
    size_t plan_values[CKCA__MODES]; /* floats of activations per picture; 0: not planned yet */
    ckca__recompute *recompute[CKCA__MODES]; /* in the order in which they are recomputed */
    size_t recompute_capacity[CKCA__MODES];
    int recomputes[CKCA__MODES];

    float *values, *gradients, *momentum; /* arenas of all, trained and trained floats; NULL until needed */
    float *rate;      /* on the device, when training: ckca_sgd's learning rate and the factor of clipping */
    float *folded;    /* evaluation: trainable floats, convolution weights with batch norm folded in, biases at beta */
    int folded_valid; /* 1: folded and packed_weights match values */
    int frozen_valid; /* 1: so do what training reads of frozen layers: their part of folded and saved */
    float *saved;     /* batch statistics of the last training forward pass */
    float *activations;
    size_t activation_bytes;
    void *workspace;      /* scratch memory of one op */
    void *packed_weights; /* weights in the layout that convolutions read, see ckca__pack_weights */
    size_t workspace_bytes, packed_bytes;
    const float *input;     /* of the last forward pass: n x height x width x channels, on the device */
    int n;                  /* its pictures; 0: its outputs are no longer there */
    int mode;               /* CKCA__MODE_... */
    ckca__unsaved *unsaved; /* finished updates whose result is not saved yet */
    int evaluation_batch;   /* pictures at a time in ckca__evaluate_all; 0: CKCA__EVAL_BATCH */
    int sums_gradients;     /* 1: the backward pass also sums gradients over ranks, see ckca__sum_bucket */
    float share;            /* of this rank's gradient in that sum */
    size_t summed_from;     /* gradients from here to trained_decayed have been started */
    int recompute_outputs;  /* 1: backward recomputes batch norms' outputs; 0, on a GPU with memory: they are kept */
};

/* A mode is a set of flags that says what a forward pass must keep: TRAIN: what backward reads; STAGES: the stages'
   outputs, for FeatReg; READABLE: all outputs, for ckca_node_read. Each mode has its own memory plan. */
enum { CKCA__MODE_EVALUATE = 0, CKCA__MODE_TRAIN = 1, CKCA__MODE_STAGES = 2, CKCA__MODE_READABLE = 4 };

/* In EXECUTION: */
static void ckca__shape(const ckca_model *m, const ckca__node *node, int n, int mode, ckca__conv *s);
static int ckca__stored_node(const ckca_model *m, int i, int mode, const ckca__norm **norm);
static ckca__statistics ckca__statistics_of(const ckca_model *m, const ckca__node *tail);
static float *ckca__value(const ckca_model *m, int i);
static float *ckca__backward_value(const ckca_model *m, int i);
static float *ckca__grad(const ckca_model *m, int i);
static void *ckca__side(const ckca_model *m, int i);
static float *ckca__param(const ckca_model *m, const ckca__node *node, float *arena, int which);
static float *ckca__gradient(const ckca_model *m, const ckca__node *node, int which);
static int ckca__trains(const ckca_model *m, int i, int mode);
static size_t ckca__rows(const ckca__node *x, int n);
static const float *ckca__input(const ckca_model *m, int i);
static const float *ckca__backward_input(const ckca_model *m, int i);
static float *ckca__grad_into(ckca_model *m, int i, int *add);

/* In MEMORY PLAN: */
static size_t ckca__node_floats(const ckca__node *x);

/* ---- building ---- */

/* Stores the first error of building m for ckca_model_finish; returns -1, as the layer builders do. */
static int ckca__build_error(ckca_model *m, ckca_status status, const char *format, ...) CKCA__PRINTF(3, 4);
static int ckca__build_error(ckca_model *m, ckca_status status, const char *format, ...) {
    char sentence[sizeof m->failure];
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    va_end(args);
    if (!m->failed && !m->finished) { /* an error after ckca_model_finish leaves the model usable */
        memcpy(m->failure, sentence, sizeof sentence);
        m->failed = status;
    }
    ckca__fail(m->ctx, status, "%s", sentence);
    return -1;
}

/* The range of valid nodes, for messages. */
static const char *ckca__node_range(const ckca_model *m, char *text, size_t capacity) {
    if (m->nodes)
        snprintf(text, capacity, "nodes are 0 to %d", m->nodes - 1);
    else
        snprintf(text, capacity, "the model is empty: begin with ckca_layer_input");
    return text;
}

static ckca_status ckca__check_finished(const ckca_model *m, const char *call) {
    if (m->finished) return CKCA_OK;
    return ckca__fail(m->ctx, CKCA_EINVAL, "%s: the model is not finished (ckca_model_finish)", call);
}

/* Starts a node with 0 to 2 inputs a and b; the caller sets its shape and fields and ends with ckca__commit_node.
   Returns NULL on failure. */
static ckca__node *ckca__add_node(ckca_model *m, ckca__kind kind, const char *name, int a, int b, int inputs) {
    ckca__node *node;
    int i, in[2];
    in[0] = a;
    in[1] = b;
    if (!m || m->failed) return NULL;
    if (m->finished) {
        ckca__build_error(m, CKCA_EINVAL, "%s: the model is finished, no node can be added", ckca__kind_name[kind]);
        return NULL;
    }
    for (i = 0; i < inputs; i++) {
        if (in[i] < 0 || in[i] >= m->nodes) {
            char nodes[64];
            ckca__build_error(m, CKCA_EINVAL, "%s%s%.70s: there is no node %d (%s)", ckca__kind_name[kind],
                              name && *name ? " " : "", name ? name : "", in[i],
                              ckca__node_range(m, nodes, sizeof nodes));
            return NULL;
        }
    }
    if (name) {
        size_t length = strlen(name);
        for (i = 0; name[i]; i++)
            if (!((name[i] >= 'a' && name[i] <= 'z') || (name[i] >= 'A' && name[i] <= 'Z') ||
                  (name[i] >= '0' && name[i] <= '9') || name[i] == '.' || name[i] == '_'))
                break;
        if (!length || length >= CKCA__NAME_MAX || name[i]) {
            ckca__build_error(m, CKCA_EINVAL, "%s: the name \"%.70s\" needs 1 to %d letters, digits, '.' or '_'",
                              ckca__kind_name[kind], name, CKCA__NAME_MAX - 1);
            return NULL;
        }
        for (i = 0; i < m->nodes; i++) {
            if (!strcmp(m->node[i].name, name)) {
                ckca__build_error(m, CKCA_EINVAL, "%s: node %d already has the name \"%s\"", ckca__kind_name[kind], i,
                                  name);
                return NULL;
            }
        }
    }
    if (m->nodes >= CKCA__NODES_MAX) {
        ckca__build_error(m, CKCA_EINVAL, "a model has at most %d nodes", CKCA__NODES_MAX);
        return NULL;
    }
    if (!ckca__grow(m->ctx, (void **)&m->node, (size_t)m->nodes, &m->node_capacity, sizeof *m->node)) {
        ckca__build_error(m, CKCA_ENOMEM, "out of memory for node %d", m->nodes);
        return NULL;
    }
    node = &m->node[m->nodes];
    memset(node, 0, sizeof *node);
    node->kind = kind;
    node->in[0] = inputs > 0 ? a : -1;
    node->in[1] = inputs > 1 ? b : -1;
    node->tensor = node->head = node->source = node->residual = -1;
    node->rate = 1;
    if (name) memcpy(node->name, name, strlen(name) + 1);
    return node;
}

/* Adds the node under construction to the model: checks the size of its output and counts it as a reader of its inputs.
   Returns its index, or -1. */
static int ckca__commit_node(ckca_model *m, ckca__node *node) {
    int i;
    if (node->h < 1 || node->w < 1 || node->c < 1 ||
        ckca__mul(ckca__mul((size_t)node->h, (size_t)node->w), (size_t)node->c) > CKCA__VALUES_MAX)
        return ckca__build_error(m, CKCA_ESHAPE, "%s %s: its output would be %d x %d x %d, which is empty or too large",
                                 ckca__kind_name[node->kind], node->name, node->h, node->w, node->c);
    for (i = 0; i < 2; i++)
        if (node->in[i] >= 0) m->node[node->in[i]].readers++;
    return m->nodes++;
}

/* Adds a parameter of shape a x b x c x d (in PyTorch's order; dims of them count, the others are 1) to the node under
   construction. */
static ckca__parameter *ckca__add_parameter(ckca_model *m, const char *suffix, ckca__role role, int dims, int a, int b,
                                            int c, int d) {
    ckca__node *node = &m->node[m->nodes]; /* under construction */
    ckca__parameter *p;
    if (!ckca__grow(m->ctx, (void **)&m->parameter, (size_t)m->parameters, &m->parameter_capacity,
                    sizeof *m->parameter)) {
        ckca__build_error(m, CKCA_ENOMEM, "out of memory for parameter %d", m->parameters);
        return NULL;
    }
    p = &m->parameter[m->parameters];
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s.%s", node->name, suffix);
    p->role = role;
    p->node = m->nodes;
    p->dims = dims;
    p->shape[0] = a;
    p->shape[1] = b;
    p->shape[2] = c;
    p->shape[3] = d;
    p->count = ckca__mul(ckca__mul((size_t)a, (size_t)b), ckca__mul((size_t)c, (size_t)d));
    if (p->count > CKCA__VALUES_MAX) {
        ckca__build_error(m, CKCA_ESHAPE, "%s: %d x %d x %d x %d is too large", p->name, a, b, c, d);
        return NULL;
    }
    if (node->tensor < 0) node->tensor = m->parameters;
    m->parameters++;
    return p;
}

/* ---- layers ----

   Everything about one kind of layer is in one place: its builder, which checks shapes, then the functions in its row
   of ckca__layers. Other code uses the table and does not mention kinds. The exception is ckca__fuse, which groups
   convolution, batch norm, add and ReLU; such a group runs through the batch norm's row.

   forward and backward run node i of m; the batch, the mode and the buffers are set in m. backward reads the gradient of
   the output, writes or adds to the gradient of each input (ckca__grad_into), and adds to the parameters' gradients. */

/* The parameters of a node, in the order in which its builder adds them; for ckca__param. */
enum {
    CKCA__PARAM_WEIGHT = 0,
    CKCA__PARAM_BIAS,
    CKCA__PARAM_GAMMA = 0,
    CKCA__PARAM_BETA,
    CKCA__PARAM_MEAN,
    CKCA__PARAM_VAR
};

/* Properties of a kind: what the memory plan, fusion, bfloat16 and the arenas need to know about it. */
enum {
    CKCA__LAYER_READS_INPUT = 1,       /* backward reads the forward pass's input */
    CKCA__LAYER_READS_OUTPUT = 2,      /* backward reads the forward pass's output (ReLU: where it is positive) */
    CKCA__LAYER_NORMALIZES = 4,        /* can apply the batch norm before it while reading, where ckca__may_norm */
    CKCA__LAYER_CONVOLUTION = 8,       /* its first parameter is a convolution weight, see ckca__pack_weights */
    CKCA__LAYER_BATCH_STATISTICS = 16, /* training saves mean and inv_std of each channel in model->saved */
    CKCA__LAYER_FROM_PICTURES = 32,    /* its input may be the float32 pictures while its output is bfloat16 */
    CKCA__LAYER_TO_FLOAT32 = 64,       /* its output is float32 whatever its input is */
    CKCA__LAYER_LOGITS = 128           /* input and output are float32; the logits must be such a node */
};

enum { CKCA__LAYER_NUMBERS = 6 };

typedef struct ckca__layer {
    int inputs; /* 0 to 2 */
    int named;  /* 1: it has a name, and its parameters' names begin with it */
    /* The int fields of ckca__node that the graph's text holds, as byte offsets; 0 ends the list. */
    size_t number[CKCA__LAYER_NUMBERS];
    unsigned flags; /* CKCA__LAYER_... */
    /* Builds a node from the graph's text. number: the input nodes, then the fields above. */
    int (*build)(ckca_model *m, const char *name, const int *number);
    void (*forward)(ckca_model *m, int i);
    void (*backward)(ckca_model *m, int i); /* NULL for the input */
    /* Bytes of scratch memory for n pictures. */
    size_t (*workspace)(const ckca_model *m, const ckca__node *x, int n, int mode);
    /* Floats per picture that forward saves for backward beside the output (ckca__side); NULL: none. */
    size_t (*side)(const ckca__node *x);
    int optional; /* 1: the text leaves the last number out where it is 0, as files of earlier versions do */
} ckca__layer;

/* Scratch memory of ops that need ckca__op_workspace for their output. */
static size_t ckca__workspace_map(const ckca_model *m, const ckca__node *x, int n, int mode) {
    (void)mode;
    return ckca__op_workspace(m->ctx, ckca__rows(x, n), x->c);
}

CKCA_API int ckca_layer_input(ckca_model *m) {
    ckca__node *node;
    if (m && m->nodes && !m->failed && !m->finished)
        return ckca__build_error(m, CKCA_EINVAL, "input: it must be the first node, and the model already has nodes");
    node = ckca__add_node(m, CKCA__KIND_INPUT, NULL, -1, -1, 0);
    if (!node) return -1;
    node->h = m->height;
    node->w = m->width;
    node->c = m->channels;
    return ckca__commit_node(m, node);
}

static int ckca__build_input(ckca_model *m, const char *name, const int *number) {
    (void)name, (void)number;
    return ckca_layer_input(m);
}

/* Output length of a kernel that slides over length values; 0 if it does not fit. */
static int ckca__window(int length, int kernel, int stride, int pad) {
    int64_t span = (int64_t)length + 2 * (int64_t)pad - kernel;
    return span < 0 ? 0 : (int)(span / stride + 1);
}

CKCA_API int ckca_layer_conv(ckca_model *m, const char *name, int input, ckca_conv_desc desc) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_CONV, name ? name : "", input, -1, 1);
    ckca__bound bounds[6] = {{"out", 0, 1, INT_MAX, 0}, {"kernel", 0, 0, 255, 0},
                             {"stride", 0, 0, 255, 0},  {"pad", 0, 0, 0, 0}, /* at most kernel - 1 */
                             {"bias", 0, 0, 1, 0},      {"groups", 0, 0, INT_MAX, 0}};
    char text[160];
    const ckca__node *x;
    if (!node) return -1;
    x = &m->node[input];
    node->kernel = desc.kernel ? desc.kernel : 3;
    node->stride = desc.stride ? desc.stride : 1;
    node->pad = desc.pad;
    node->bias = !!desc.bias;
    node->groups = desc.groups > 1 ? desc.groups : 0;
    bounds[0].value = desc.out;
    bounds[1].value = desc.kernel;
    bounds[2].value = desc.stride;
    bounds[3].value = desc.pad;
    bounds[3].most = node->kernel - 1;
    bounds[4].value = desc.bias;
    bounds[5].value = desc.groups;
    if (ckca__out_of_bounds(bounds, 6, text, sizeof text))
        return ckca__build_error(m, CKCA_EINVAL, "conv %s: %s", name, text);
    if (node->groups && (x->c % node->groups || desc.out % node->groups))
        return ckca__build_error(m, CKCA_EINVAL,
                                 "conv %s: %d groups do not divide both the input's %d channels and the output's %d",
                                 name, node->groups, x->c, desc.out);
    node->h = ckca__window(x->h, node->kernel, node->stride, node->pad);
    node->w = ckca__window(x->w, node->kernel, node->stride, node->pad);
    node->c = desc.out;
    if (!node->h || !node->w)
        return ckca__build_error(m, CKCA_ESHAPE,
                                 "conv %s: a kernel of %d with pad %d does not fit the input of %d x %d", name,
                                 node->kernel, node->pad, x->h, x->w);
    if (!ckca__add_parameter(m, "weight", CKCA__ROLE_WEIGHT, 4, desc.out, node->groups ? x->c / node->groups : x->c,
                             node->kernel, node->kernel))
        return -1;
    if (node->bias && !ckca__add_parameter(m, "bias", CKCA__ROLE_BIAS, 1, desc.out, 1, 1, 1)) return -1;
    return ckca__commit_node(m, node);
}

static int ckca__build_conv(ckca_model *m, const char *name, const int *number) {
    ckca_conv_desc desc;
    desc.out = number[1];
    desc.kernel = number[2];
    desc.stride = number[3];
    desc.pad = number[4];
    desc.bias = number[5];
    desc.groups = number[6];
    return ckca_layer_conv(m, name, number[0], desc);
}

static void ckca__forward_conv(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    ckca__statistics statistics;
    ckca__conv s;
    ckca__shape(m, x, m->n, m->mode, &s);
    if ((m->mode & CKCA__MODE_TRAIN) && x->takes) {
        statistics = ckca__statistics_of(m, &m->node[x->takes]);
        s.statistics = &statistics;
    }
    ckca__op_conv_forward(m->ctx, &s, ckca__input(m, i), ckca__param(m, x, m->values, CKCA__PARAM_WEIGHT),
                          x->bias ? ckca__param(m, x, m->values, CKCA__PARAM_BIAS) : NULL, NULL, 0, ckca__value(m, i),
                          m->workspace);
}

static void ckca__backward_conv(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    const float *dy = ckca__grad(m, i);
    int add;
    float *dx = ckca__grad_into(m, x->source, &add);
    ckca__conv s;
    ckca__shape(m, x, m->n, m->mode, &s);
    if (x->rate > 0)
        ckca__op_conv_backward_weight(m->ctx, &s, ckca__backward_input(m, i), dy,
                                      ckca__gradient(m, x, CKCA__PARAM_WEIGHT),
                                      x->bias ? ckca__gradient(m, x, CKCA__PARAM_BIAS) : NULL, m->workspace);
    if (dx)
        ckca__op_conv_backward_data(m->ctx, &s, dy, ckca__param(m, x, m->values, CKCA__PARAM_WEIGHT), dx, add,
                                    m->workspace);
}

static size_t ckca__workspace_conv(const ckca_model *m, const ckca__node *x, int n, int mode) {
    ckca__conv s;
    ckca__shape(m, x, n, mode, &s);
    return ckca__conv_workspace(m->ctx, &s);
}

CKCA_API int ckca_layer_batchnorm(ckca_model *m, const char *name, int input) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_BATCHNORM, name ? name : "", input, -1, 1);
    int c;
    if (!node) return -1;
    node->h = m->node[input].h;
    node->w = m->node[input].w;
    node->c = c = m->node[input].c;
    if (!ckca__add_parameter(m, "weight", CKCA__ROLE_GAMMA, 1, c, 1, 1, 1) ||
        !ckca__add_parameter(m, "bias", CKCA__ROLE_BETA, 1, c, 1, 1, 1) ||
        !ckca__add_parameter(m, "running_mean", CKCA__ROLE_MEAN, 1, c, 1, 1, 1) ||
        !ckca__add_parameter(m, "running_var", CKCA__ROLE_VAR, 1, c, 1, 1, 1))
        return -1;
    return ckca__commit_node(m, node);
}

static int ckca__build_batchnorm(ckca_model *m, const char *name, const int *number) {
    return ckca_layer_batchnorm(m, name, number[0]);
}

/* Node i is the tail of a batch norm (+ add) (+ ReLU); in evaluation the group may include a folded convolution. */
static void ckca__forward_batchnorm(ckca_model *m, int i) {
    ckca__node *x = &m->node[i];
    const ckca__node *bn = &m->node[x->head], *source = &m->node[x->source];
    const ckca__norm *residual_norm;
    const int other = ckca__stored_node(m, x->residual, m->mode, &residual_norm);
    const float *residual = other >= 0 ? ckca__value(m, other) : NULL;
    const size_t rows = ckca__rows(x, m->n);
    float *y = ckca__value(m, i);
    float *gamma = ckca__param(m, bn, m->values, CKCA__PARAM_GAMMA),
          *beta = ckca__param(m, bn, m->values, CKCA__PARAM_BETA);
    float *mean = ckca__param(m, bn, m->values, CKCA__PARAM_MEAN),
          *var = ckca__param(m, bn, m->values, CKCA__PARAM_VAR);
    if (ckca__trains(m, i, m->mode)) {
        const ckca__statistics statistics = ckca__statistics_of(m, x);
        x->norm.mean = statistics.mean;
        x->norm.inv_std = statistics.inv_std;
        x->norm.gamma = gamma;
        x->norm.beta = beta;
        x->norm.relu = x->relu;
        if (source->takes != i && bn->rate > 0)
            ckca__op_batchnorm_forward(m->ctx, x->bf16, rows, x->c, ckca__value(m, x->source), gamma, beta, mean, var,
                                       residual, residual_norm, x->relu, x->fused_into_reader[m->mode] ? NULL : y,
                                       statistics.mean, statistics.inv_std, m->workspace);
        else if (!x->fused_into_reader[m->mode]) /* the convolution has taken the statistics, or they are frozen */
            ckca__op_batchnorm_recompute(m->ctx, x->bf16, rows, x->c, ckca__value(m, x->source), &x->norm, residual,
                                         residual_norm, y);
    } else if (source->folded) {
        ckca__conv s;
        ckca__shape(m, source, m->n, m->mode, &s);
        ckca__op_conv_forward(m->ctx, &s, ckca__value(m, source->in[0]),
                              ckca__param(m, source, m->folded, CKCA__PARAM_WEIGHT),
                              ckca__param(m, bn, m->folded, CKCA__PARAM_BETA), residual, x->relu, y, m->workspace);
    } else {
        ckca__op_batchnorm_eval(m->ctx, x->bf16, rows, x->c, ckca__value(m, x->source), gamma, beta, mean, var,
                                residual, x->relu, y);
    }
}

static void ckca__backward_batchnorm(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i], *bn = &m->node[x->head];
    const size_t rows = ckca__rows(x, m->n);
    int add, add_residual;
    float *dy = ckca__grad(m, i), *dresidual = ckca__grad_into(m, x->residual, &add_residual);
    float *to = ckca__grad_into(m, x->source, &add);
    /* If the input's gradient already has a value (or is not needed), dx overwrites dy and is then added. */
    float *dx = add || !to ? dy : to;
    ckca__op_batchnorm_backward(m->ctx, x->bf16, rows, x->c, ckca__backward_value(m, x->source),
                                x->residual >= 0 ? ckca__backward_value(m, i) : NULL, dy, &x->norm, dx, dresidual,
                                add_residual, ckca__gradient(m, bn, CKCA__PARAM_GAMMA),
                                ckca__gradient(m, bn, CKCA__PARAM_BETA), m->workspace);
    if (add) ckca__op_add_backward(m->ctx, x->bf16, rows * (size_t)x->c, NULL, dy, to, 1);
}

CKCA_API int ckca_layer_relu(ckca_model *m, int input) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_RELU, NULL, input, -1, 1);
    if (!node) return -1;
    node->h = m->node[input].h;
    node->w = m->node[input].w;
    node->c = m->node[input].c;
    return ckca__commit_node(m, node);
}

static int ckca__build_relu(ckca_model *m, const char *name, const int *number) {
    (void)name;
    return ckca_layer_relu(m, number[0]);
}

CKCA_API int ckca_layer_add(ckca_model *m, int a, int b) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_ADD, NULL, a, b, 2);
    const ckca__node *x, *y;
    if (!node) return -1;
    x = &m->node[a];
    y = &m->node[b];
    if (x->h != y->h || x->w != y->w || x->c != y->c)
        return ckca__build_error(m, CKCA_ESHAPE, "add: node %d is %d x %d x %d, node %d is %d x %d x %d", a, x->h, x->w,
                                 x->c, b, y->h, y->w, y->c);
    node->h = x->h;
    node->w = x->w;
    node->c = x->c;
    return ckca__commit_node(m, node);
}

static int ckca__build_add(ckca_model *m, const char *name, const int *number) {
    (void)name;
    return ckca_layer_add(m, number[0], number[1]);
}

/* y = relu?(a + b): an add, a ReLU, or an add whose tail is a ReLU. */
static void ckca__forward_add(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    const int other = ckca__stored_node(m, x->residual, m->mode, NULL);
    ckca__op_add(m->ctx, x->bf16, ckca__rows(x, m->n) * (size_t)x->c, ckca__input(m, i),
                 other >= 0 ? ckca__value(m, other) : NULL, x->relu, ckca__value(m, i));
}

static void ckca__backward_add(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    const int from[2] = {x->source, x->residual};
    int side;
    for (side = 0; side < 2; side++) {
        int add;
        float *dx = ckca__grad_into(m, from[side], &add);
        if (dx)
            ckca__op_add_backward(m->ctx, x->bf16, ckca__rows(x, m->n) * (size_t)x->c,
                                  x->relu ? ckca__backward_value(m, i) : NULL, ckca__grad(m, i), dx, add);
    }
}

CKCA_API int ckca_layer_maxpool(ckca_model *m, int input, int kernel, int stride, int pad) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_MAXPOOL, NULL, input, -1, 1);
    ckca__bound bounds[3] = {{"kernel", 0, 1, 15, 0}, {"stride", 0, 1, 255, 0}, {"pad", 0, 0, 0, 0}};
    char text[160];
    const ckca__node *x;
    if (!node) return -1;
    x = &m->node[input];
    bounds[0].value = kernel;
    bounds[1].value = stride;
    bounds[2].value = pad;
    bounds[2].most = kernel / 2;
    if (ckca__out_of_bounds(bounds, 3, text, sizeof text))
        return ckca__build_error(m, CKCA_EINVAL, "maxpool: %s", text);
    node->kernel = kernel;
    node->stride = stride;
    node->pad = pad;
    node->h = ckca__window(x->h, kernel, stride, pad);
    node->w = ckca__window(x->w, kernel, stride, pad);
    node->c = x->c;
    if (!node->h || !node->w)
        return ckca__build_error(m, CKCA_ESHAPE,
                                 "maxpool: a kernel of %d with pad %d does not fit the input of %d x %d", kernel, pad,
                                 x->h, x->w);
    return ckca__commit_node(m, node);
}

static int ckca__build_maxpool(ckca_model *m, const char *name, const int *number) {
    (void)name;
    return ckca_layer_maxpool(m, number[0], number[1], number[2], number[3]);
}

/* One byte per output: the kernel position of the maximum. */
static size_t ckca__side_maxpool(const ckca__node *x) {
    const size_t size = ckca__node_floats(x);
    return x->bf16 ? (size + 1) / 2 : (size + 3) / 4;
}

static void ckca__forward_maxpool(ckca_model *m, int i) {
    ckca__conv s;
    ckca__shape(m, &m->node[i], m->n, m->mode, &s);
    ckca__op_maxpool_forward(m->ctx, &s, ckca__input(m, i), ckca__value(m, i),
                             ckca__trains(m, i, m->mode) ? (unsigned char *)ckca__side(m, i) : NULL);
}

static void ckca__backward_maxpool(ckca_model *m, int i) {
    int add;
    float *dx = ckca__grad_into(m, m->node[i].source, &add);
    ckca__conv s;
    ckca__shape(m, &m->node[i], m->n, m->mode, &s);
    if (dx) ckca__op_maxpool_backward(m->ctx, &s, ckca__grad(m, i), (const unsigned char *)ckca__side(m, i), dx, add);
}

CKCA_API int ckca_layer_avgpool(ckca_model *m, int input) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_AVGPOOL, NULL, input, -1, 1);
    if (!node) return -1;
    node->h = node->w = 1;
    node->c = m->node[input].c;
    return ckca__commit_node(m, node);
}

static int ckca__build_avgpool(ckca_model *m, const char *name, const int *number) {
    (void)name;
    return ckca_layer_avgpool(m, number[0]);
}

static void ckca__forward_avgpool(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i], *source = &m->node[x->source];
    ckca__op_avgpool_forward(m->ctx, source->bf16, m->n, source->h * source->w, x->c, ckca__input(m, i),
                             ckca__value(m, i));
}

static void ckca__backward_avgpool(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i], *source = &m->node[x->source];
    int add;
    float *dx = ckca__grad_into(m, x->source, &add);
    if (dx)
        ckca__op_avgpool_backward(m->ctx, source->bf16, m->n, source->h * source->w, x->c, ckca__grad(m, i), dx, add);
}

CKCA_API int ckca_layer_subsample(ckca_model *m, int input, int stride, int out) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_SUBSAMPLE, NULL, input, -1, 1);
    ckca__bound bounds[2] = {{"stride", 0, 1, 255, 0}, {"out", 0, 0, INT_MAX, 0}};
    char text[160];
    const ckca__node *x;
    if (!node) return -1;
    x = &m->node[input];
    bounds[0].value = stride;
    bounds[1].value = out;
    bounds[1].least = x->c; /* it can add channels, not remove them */
    if (ckca__out_of_bounds(bounds, 2, text, sizeof text))
        return ckca__build_error(m, CKCA_EINVAL, "subsample: %s", text);
    node->kernel = 1;
    node->stride = stride;
    node->h = (x->h - 1) / stride + 1;
    node->w = (x->w - 1) / stride + 1;
    node->c = out;
    return ckca__commit_node(m, node);
}

static int ckca__build_subsample(ckca_model *m, const char *name, const int *number) {
    (void)name;
    return ckca_layer_subsample(m, number[0], number[1], number[2]);
}

static void ckca__forward_subsample(ckca_model *m, int i) {
    ckca__conv s;
    ckca__shape(m, &m->node[i], m->n, m->mode, &s);
    ckca__op_subsample_forward(m->ctx, &s, ckca__input(m, i), ckca__value(m, i));
}

static void ckca__backward_subsample(ckca_model *m, int i) {
    int add;
    float *dx = ckca__grad_into(m, m->node[i].source, &add);
    ckca__conv s;
    ckca__shape(m, &m->node[i], m->n, m->mode, &s);
    if (dx) ckca__op_subsample_backward(m->ctx, &s, ckca__grad(m, i), dx, add);
}

CKCA_API int ckca_layer_linear(ckca_model *m, const char *name, int input, int out) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_LINEAR, name ? name : "", input, -1, 1);
    const ckca__node *x;
    if (!node) return -1;
    x = &m->node[input];
    if (out < 1) return ckca__build_error(m, CKCA_EINVAL, "linear %s: out is %d, must be 1 to %d", name, out, INT_MAX);
    node->h = node->w = 1;
    node->c = out;
    if (!ckca__add_parameter(m, "weight", CKCA__ROLE_WEIGHT, 2, out, x->h * x->w * x->c, 1, 1) ||
        !ckca__add_parameter(m, "bias", CKCA__ROLE_BIAS, 1, out, 1, 1, 1))
        return -1;
    return ckca__commit_node(m, node);
}

static int ckca__build_linear(ckca_model *m, const char *name, const int *number) {
    return ckca_layer_linear(m, name, number[0], number[1]);
}

static void ckca__forward_linear(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i], *source = &m->node[x->source];
    ckca__op_linear_forward(m->ctx, m->n, source->h * source->w * source->c, x->c, ckca__input(m, i),
                            ckca__param(m, x, m->values, CKCA__PARAM_WEIGHT),
                            ckca__param(m, x, m->values, CKCA__PARAM_BIAS), ckca__value(m, i), m->workspace);
}

static void ckca__backward_linear(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i], *source = &m->node[x->source];
    int add;
    float *dx = ckca__grad_into(m, x->source, &add);
    ckca__op_linear_backward(m->ctx, m->n, source->h * source->w * source->c, x->c, ckca__backward_input(m, i),
                             ckca__param(m, x, m->values, CKCA__PARAM_WEIGHT), ckca__grad(m, i), dx, add,
                             ckca__gradient(m, x, CKCA__PARAM_WEIGHT), ckca__gradient(m, x, CKCA__PARAM_BIAS),
                             m->workspace);
}

/* The linear layer runs as a 1x1 convolution over one picture of n pixels. */
static size_t ckca__workspace_linear(const ckca_model *m, const ckca__node *x, int n, int mode) {
    ckca__conv s;
    (void)mode;
    memset(&s, 0, sizeof s);
    s.n = s.h = s.r = s.s = s.stride = s.p = 1;
    s.w = s.q = n;
    s.c = m->parameter[x->tensor].shape[1];
    s.k = x->c;
    return ckca__conv_workspace(m->ctx, &s);
}

CKCA_API int ckca_layer_groupnorm(ckca_model *m, const char *name, int input, int groups) {
    ckca__node *node = ckca__add_node(m, CKCA__KIND_GROUPNORM, name ? name : "", input, -1, 1);
    int c;
    if (!node) return -1;
    node->h = m->node[input].h;
    node->w = m->node[input].w;
    node->c = c = m->node[input].c;
    node->groups = groups;
    if (groups < 1 || c % groups)
        return ckca__build_error(m, CKCA_EINVAL, "gn %s: %d groups do not divide the input's %d channels", name, groups,
                                 c);
    if (!ckca__add_parameter(m, "weight", CKCA__ROLE_GAMMA, 1, c, 1, 1, 1) ||
        !ckca__add_parameter(m, "bias", CKCA__ROLE_BETA, 1, c, 1, 1, 1))
        return -1;
    return ckca__commit_node(m, node);
}

static int ckca__build_groupnorm(ckca_model *m, const char *name, const int *number) {
    return ckca_layer_groupnorm(m, name, number[0], number[1]);
}

static void ckca__forward_groupnorm(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    ckca__op_groupnorm_forward(m->ctx, x->bf16, m->n, x->h * x->w, x->c, x->groups, ckca__input(m, i),
                               ckca__param(m, x, m->values, CKCA__PARAM_GAMMA),
                               ckca__param(m, x, m->values, CKCA__PARAM_BETA), ckca__value(m, i),
                               ckca__trains(m, i, m->mode) ? (float *)ckca__side(m, i) : NULL);
}

static void ckca__backward_groupnorm(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    int add;
    float *dx = ckca__grad_into(m, x->source, &add);
    ckca__op_groupnorm_backward(m->ctx, x->bf16, m->n, x->h * x->w, x->c, x->groups, ckca__backward_input(m, i),
                                ckca__param(m, x, m->values, CKCA__PARAM_GAMMA), (const float *)ckca__side(m, i),
                                ckca__grad(m, i), dx, add, ckca__gradient(m, x, CKCA__PARAM_GAMMA),
                                ckca__gradient(m, x, CKCA__PARAM_BETA), m->workspace);
}

/* Each picture's share of the gradients of gamma and beta: n x 2 x C floats. */
static size_t ckca__workspace_groupnorm(const ckca_model *m, const ckca__node *x, int n, int mode) {
    (void)m, (void)mode;
    return ckca__mul(2 * (size_t)n, (size_t)x->c * sizeof(float));
}

/* Mean and inv_std of each group. */
static size_t ckca__side_groupnorm(const ckca__node *x) { return 2 * (size_t)x->groups; }

/* One row per kind, in the order of ckca__kind; see ckca__layer for the columns. */
#define CKCA__FIELD(name) offsetof(ckca__node, name)
static const ckca__layer ckca__layers[CKCA__KIND_COUNT] = {
    /* input */
    {0, 0, {0}, 0, ckca__build_input, NULL, NULL, ckca__workspace_map, NULL, 0},
    /* conv */
    {1,
     1,
     {CKCA__FIELD(c), CKCA__FIELD(kernel), CKCA__FIELD(stride), CKCA__FIELD(pad), CKCA__FIELD(bias),
      CKCA__FIELD(groups)},
     CKCA__LAYER_READS_INPUT | CKCA__LAYER_NORMALIZES | CKCA__LAYER_CONVOLUTION | CKCA__LAYER_FROM_PICTURES,
     ckca__build_conv,
     ckca__forward_conv,
     ckca__backward_conv,
     ckca__workspace_conv,
     NULL,
     1},
    /* bn */
    {1,
     1,
     {0},
     CKCA__LAYER_READS_INPUT | CKCA__LAYER_BATCH_STATISTICS,
     ckca__build_batchnorm,
     ckca__forward_batchnorm,
     ckca__backward_batchnorm,
     ckca__workspace_map,
     NULL,
     0},
    /* relu */
    {1,
     0,
     {0},
     CKCA__LAYER_READS_OUTPUT,
     ckca__build_relu,
     ckca__forward_add,
     ckca__backward_add,
     ckca__workspace_map,
     NULL,
     0},
    /* add */
    {2, 0, {0}, 0, ckca__build_add, ckca__forward_add, ckca__backward_add, ckca__workspace_map, NULL, 0},
    /* maxpool */
    {1,
     0,
     {CKCA__FIELD(kernel), CKCA__FIELD(stride), CKCA__FIELD(pad)},
     CKCA__LAYER_NORMALIZES,
     ckca__build_maxpool,
     ckca__forward_maxpool,
     ckca__backward_maxpool,
     ckca__workspace_map,
     ckca__side_maxpool,
     0},
    /* avgpool */
    {1,
     0,
     {0},
     CKCA__LAYER_TO_FLOAT32,
     ckca__build_avgpool,
     ckca__forward_avgpool,
     ckca__backward_avgpool,
     ckca__workspace_map,
     NULL,
     0},
    /* subsample */
    {1,
     0,
     {CKCA__FIELD(stride), CKCA__FIELD(c)},
     0,
     ckca__build_subsample,
     ckca__forward_subsample,
     ckca__backward_subsample,
     ckca__workspace_map,
     NULL,
     0},
    /* linear */
    {1,
     1,
     {CKCA__FIELD(c)},
     CKCA__LAYER_READS_INPUT | CKCA__LAYER_LOGITS,
     ckca__build_linear,
     ckca__forward_linear,
     ckca__backward_linear,
     ckca__workspace_linear,
     NULL,
     0},
    /* gn */
    {1,
     1,
     {CKCA__FIELD(groups)},
     CKCA__LAYER_READS_INPUT,
     ckca__build_groupnorm,
     ckca__forward_groupnorm,
     ckca__backward_groupnorm,
     ckca__workspace_groupnorm,
     ckca__side_groupnorm,
     0},
};
#undef CKCA__FIELD

/* 1 if the kind of node i has the property flag. */
static int ckca__has_flag(const ckca_model *m, int i, unsigned flag) {
    return (ckca__layers[m->node[i].kind].flags & flag) != 0;
}

/* The row that runs node i; a batch norm's tail runs through the batch norm's row. */
static const ckca__layer *ckca__layer_of(const ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    return &ckca__layers[x->head >= 0 ? m->node[x->head].kind : x->kind];
}

CKCA_API int ckca_layer_stage(ckca_model *m, int input) {
    char nodes[64];
    if (!m || m->failed) return -1;
    if (m->finished)
        return ckca__build_error(m, CKCA_EINVAL, "stage: the model is finished, its nodes cannot be marked any more");
    if (input < 0 || input >= m->nodes)
        return ckca__build_error(m, CKCA_EINVAL, "stage: there is no node %d (%s)", input,
                                 ckca__node_range(m, nodes, sizeof nodes));
    if (input == 0) return ckca__build_error(m, CKCA_EINVAL, "stage: node 0 is the pictures, which have no gradient");
    m->node[input].stage = 1;
    return input;
}

/* Empties the list; the files of the training states stay. */
static void ckca__forget_unsaved(ckca_model *m) {
    while (m->unsaved) {
        ckca__unsaved *u = m->unsaved;
        m->unsaved = u->next;
        ckca__release(m->ctx, u);
    }
}

CKCA_API void ckca_model_free(ckca_model *m) {
    ckca_context *ctx;
    int mode;
    if (!m) return;
    ctx = m->ctx;
    ckca__free_names(ctx, m->class_names, m->classes);
    ckca__forget_unsaved(m);
    ckca__release(ctx, m->normalization);
    ckca__release(ctx, m->centroids.count);
    ckca__release(ctx, m->node);
    ckca__release(ctx, m->parameter);
    for (mode = 0; mode < CKCA__MODES; mode++) ckca__release(ctx, m->recompute[mode]);
    ckca__device_release(ctx, m->values, m->all * sizeof(float));
    ckca__device_release(ctx, m->gradients, m->trained * sizeof(float));
    ckca__device_release(ctx, m->momentum, m->trained * sizeof(float));
    ckca__device_release(ctx, m->rate, 2 * sizeof *m->rate);
    ckca__device_release(ctx, m->folded, m->trainable * sizeof(float));
    ckca__device_release(ctx, m->saved, m->saved_count * sizeof(float));
    ckca__device_release(ctx, m->activations, m->activation_bytes);
    ckca__device_release(ctx, m->workspace, m->workspace_bytes);
    ckca__device_release(ctx, m->packed_weights, m->packed_bytes);
    ckca__release(ctx, m);
}

CKCA_API ckca_status ckca_model_create(ckca_context *ctx, ckca_model **out, const ckca_model_desc *desc) {
    ckca__bound bounds[7] = {{"height", 0, 0, 65536, 0},    {"width", 0, 0, 65536, 0},
                             {"channels", 0, 0, 65536, 0},  {"classes", 0, 1, CKCA__CLASSES_MAX, 0},
                             {"width_base", 0, 0, 4096, 0}, {"projection", 0, 0, 1, 0},
                             {"zero_residual", 0, 0, 1, 0}};
    ckca_model *m;
    ckca_status status;
    int i;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!out || !desc) return ckca__null(ctx, "ckca_model_create", !out ? "model" : "desc");
    bounds[0].value = desc->height;
    bounds[1].value = desc->width;
    bounds[2].value = desc->channels;
    bounds[3].value = desc->classes;
    bounds[4].value = desc->width_base;
    bounds[5].value = desc->projection;
    bounds[6].value = desc->zero_residual;
    if ((status = ckca__check_bounds(ctx, "model", bounds, 7))) return status;
    if (!desc->mean != !desc->std)
        return ckca__fail(ctx, CKCA_EINVAL, "model: %s is NULL: give both mean and std, or neither",
                          desc->mean ? "std" : "mean");
    if (desc->class_names && (status = ckca__check_names(ctx, "model", desc->class_names, desc->classes)))
        return status;
    m = (ckca_model *)ckca__alloc(ctx, sizeof *m);
    if (!m) return ckca__fail(ctx, CKCA_ENOMEM, "out of memory for a model");
    m->ctx = ctx;
    m->recompute_outputs = CKCA__DEVICE_IS_HOST;
    m->height = desc->height ? desc->height : 32;
    m->width = desc->width ? desc->width : 32;
    m->channels = desc->channels ? desc->channels : 3;
    m->classes = desc->classes;
    m->seed = desc->seed;
    snprintf(m->arch, sizeof m->arch, "custom");
    m->normalization = (float *)ckca__alloc(ctx, (size_t)m->channels * 2 * sizeof(float));
    if (desc->class_names) m->class_names = ckca__copy_names(ctx, desc->class_names, m->classes);
    if (!m->normalization || (desc->class_names && !m->class_names)) {
        ckca_model_free(m);
        return ckca__fail(ctx, CKCA_ENOMEM, "out of memory for a model's %d class names", desc->classes);
    }
    if (desc->mean) {
        for (i = 0; i < m->channels; i++) {
            if (!(desc->std[i] > 0) || !(desc->std[i] <= 1e6f) || !(fabsf(desc->mean[i]) <= 1e6f)) {
                float mean = desc->mean[i], std = desc->std[i];
                ckca_model_free(m);
                return ckca__fail(ctx, CKCA_EINVAL,
                                  "model: mean[%d] is %g and std[%d] is %g; a mean may be -1e6 to 1e6, a std above 0 "
                                  "to 1e6",
                                  i, (double)mean, i, (double)std);
            }
            m->normalization[i] = desc->mean[i];
            m->normalization[m->channels + i] = desc->std[i];
        }
        m->normalized = 1;
    }
    *out = m;
    return CKCA_OK;
}

/* Groups the nodes that run as one op. In node order, so that a batch norm is grouped before the add that reads it, and
   an add before its ReLU. Only this function and ckca__fold mention kinds. */
static void ckca__fuse(ckca_model *m) {
    int i;
    for (i = 0; i < m->nodes; i++) { /* an earlier ckca_model_finish may have failed after this */
        m->node[i].fused = m->node[i].folded = m->node[i].relu = 0;
        m->node[i].head = m->node[i].residual = -1;
    }
    for (i = 0; i < m->nodes; i++) {
        ckca__node *node = &m->node[i];
        node->source = node->in[0];
        if (node->kind == CKCA__KIND_BATCHNORM) {
            const ckca__node *x = &m->node[node->in[0]];
            node->head = i;
            m->node[node->in[0]].folded = x->kind == CKCA__KIND_CONV && x->readers == 1 && !x->stage;
        } else if (node->kind == CKCA__KIND_ADD) {
            int side;
            node->residual = node->in[1];
            for (side = 0; side < 2; side++) { /* at most one of the two batch norms joins the group */
                ckca__node *x = &m->node[node->in[side]];
                if (x->kind != CKCA__KIND_BATCHNORM || x->readers != 1 || x->stage) continue;
                x->fused = 1;
                node->head = node->in[side];
                node->source = x->in[0];
                node->residual = node->in[1 - side];
                break;
            }
        } else if (node->kind == CKCA__KIND_RELU) {
            ckca__node *x = &m->node[node->in[0]];
            node->relu = 1;
            if ((x->kind == CKCA__KIND_BATCHNORM || x->kind == CKCA__KIND_ADD) && x->readers == 1 && !x->stage) {
                x->fused = 1;
                node->head = x->head;
                node->source = x->source;
                node->residual = x->residual;
            }
        }
    }
}

/* Sets every parameter's offset: first weights with decay, then the other trainable ones, then running statistics. */
static void ckca__layout_parameters(ckca_model *m) {
    int i, part;
    size_t offset = 0;
    for (part = 0; part < 3; part++) {
        for (i = 0; i < m->parameters; i++) {
            ckca__parameter *p = &m->parameter[i];
            int belongs = p->role == CKCA__ROLE_WEIGHT ? 0 : p->role < CKCA__ROLE_MEAN ? 1 : 2;
            if (belongs != part) continue;
            p->offset = offset;
            offset = ckca__sum(offset, ckca__round_up(p->count, CKCA__ALIGN / sizeof(float)));
        }
        if (part == 0) m->decayed = offset;
        if (part == 1) m->trainable = offset;
    }
    m->all = offset;
    m->saved_count = 0;
    for (i = 0; i < m->nodes; i++) {
        if (!ckca__has_flag(m, i, CKCA__LAYER_BATCH_STATISTICS)) continue;
        m->node[i].saved = m->saved_count;
        m->saved_count += 2 * ckca__round_up((size_t)m->node[i].c, CKCA__ALIGN / sizeof(float));
    }
}

/* After a change of the nodes' rates: finds what runs as in evaluation, and lays out gradients and momentum in the
   order of the values, without the frozen ones. */
static void ckca__layout_training(ckca_model *m) {
    size_t slot = 0;
    int i, part;
    for (i = 0; i < m->nodes; i++) {
        ckca__node *x = &m->node[i];
        x->constant = x->tensor < 0 || x->rate == 0;
        if (x->in[0] >= 0 && !m->node[x->in[0]].constant) x->constant = 0;
        if (x->in[1] >= 0 && !m->node[x->in[1]].constant) x->constant = 0;
        x->evaluates = 0;
    }
    for (i = 1; i < m->nodes; i++)
        if (!m->node[i].fused && m->node[i].head >= 0 && m->node[i].constant)
            m->node[m->node[i].source].evaluates = m->node[m->node[i].source].folded;
    m->trained_decayed = 0;
    for (part = 0; part < 2; part++)
        for (i = 0; i < m->parameters; i++) {
            ckca__parameter *p = &m->parameter[i];
            if (p->role >= CKCA__ROLE_MEAN || (p->role == CKCA__ROLE_WEIGHT) != !part || m->node[p->node].rate == 0)
                continue;
            p->slot = slot;
            slot += ckca__round_up(p->count, CKCA__ALIGN / sizeof(float));
            if (!part) m->trained_decayed = slot;
        }
    m->trained = slot;
    m->frozen_valid = 0;
}

/* With CKCA_PRECISION_BF16: chooses which outputs are bfloat16. Pictures, and the outputs of global pooling and linear
   layers, are float32. Two ops convert between float32 and bfloat16: a convolution that reads the pictures and global
   pooling. Every other op has outputs of its inputs' type, so float32 spreads along the graph in both directions. */
static void ckca__choose_bf16(ckca_model *m) {
    int i, side, changed = m->ctx->precision == CKCA_PRECISION_BF16;
    for (i = 1; i < m->nodes; i++)
        m->node[i].bf16 = changed && !ckca__has_flag(m, i, CKCA__LAYER_TO_FLOAT32 | CKCA__LAYER_LOGITS);
    while (changed) {
        changed = 0;
        for (i = 1; i < m->nodes; i++)
            for (side = 0; side < 2; side++) {
                ckca__node *x = &m->node[i], *in = x->in[side] < 0 ? x : &m->node[x->in[side]];
                if (x->bf16 == in->bf16 || ckca__has_flag(m, i, CKCA__LAYER_TO_FLOAT32) ||
                    (ckca__has_flag(m, i, CKCA__LAYER_FROM_PICTURES) && in == m->node))
                    continue;
                x->bf16 = in->bf16 = 0;
                changed = 1;
            }
    }
}

/* Everything in ckca_model_finish but the weights: checks the logits, chooses types, fuses, lays the parameters out. */
static ckca_status ckca__finish_graph(ckca_model *m, int logits) {
    ckca_context *ctx = m->ctx;
    char nodes[64];
    if (m->failed) return ckca__fail(ctx, m->failed, "%s", m->failure);
    if (m->finished) return ckca__fail(ctx, CKCA_EINVAL, "ckca_model_finish: the model is already finished");
    if (logits < 0 || logits >= m->nodes)
        return ckca__fail(ctx, CKCA_EINVAL, "logits: there is no node %d (%s)", logits,
                          ckca__node_range(m, nodes, sizeof nodes));
    if (!ckca__has_flag(m, logits, CKCA__LAYER_LOGITS))
        return ckca__fail(ctx, CKCA_EINVAL, "logits: node %d is %s, not linear", logits,
                          ckca__kind_name[m->node[logits].kind]);
    if (m->node[logits].c != m->classes)
        return ckca__fail(ctx, CKCA_ESHAPE, "logits: %s has %d outputs, the model has %d classes", m->node[logits].name,
                          m->node[logits].c, m->classes);
    m->logits = logits;
    m->pooled = m->node[logits].in[0];
    if (m->pooled == 0)
        return ckca__fail(ctx, CKCA_EINVAL, "logits: at least one layer is needed between input and logits");
    m->features = m->node[m->pooled].h * m->node[m->pooled].w * m->node[m->pooled].c;
    m->node[logits].readers++;
    m->node[m->pooled].readers++; /* features are an output too, so no later node may absorb them */
    ckca__choose_bf16(m);
    ckca__fuse(m);
    ckca__layout_parameters(m);
    ckca__layout_training(m);
    return CKCA_OK;
}

/* Initial weights as a pure function of (seed, parameter, element): convolutions Kaiming normal, fan out, for ReLU (He
   et al. 2015, torchvision's ResNet), linear layers and biases uniform in +-1/sqrt(fan in) (PyTorch's defaults), norms
   1 and 0. host gets m->all floats in the arenas' layout; the draws follow PyTorch's order of elements, so the values
   do not depend on that layout. */
static void ckca__draw_weights(const ckca_model *m, uint64_t seed, float *host) {
    int i;
    for (i = 0; i < m->parameters; i++) {
        const ckca__parameter *p = &m->parameter[i];
        const ckca__node *node = &m->node[p->node];
        float *w = host + p->offset;
        uint64_t base = (uint64_t)i << 32;
        size_t e, fan_in = m->parameter[node->tensor].count / (size_t)node->c;
        double bound = 1.0 / sqrt((double)fan_in);
        if (p->role == CKCA__ROLE_WEIGHT && p->dims == 4) {
            double std = sqrt(2.0 / ((double)p->shape[0] * p->shape[2] * p->shape[3]));
            for (e = 0; e < p->count; e++) { /* Box-Muller: one normal from two uniforms */
                double u = 1.0 - ckca__uniform(seed, CKCA__STREAM_INIT, base + 2 * e);
                double v = ckca__uniform(seed, CKCA__STREAM_INIT, base + 2 * e + 1);
                w[e] = (float)(std * sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
            }
        } else if (p->role == CKCA__ROLE_WEIGHT || p->role == CKCA__ROLE_BIAS) {
            for (e = 0; e < p->count; e++)
                w[e] = (float)(bound * (2.0 * ckca__uniform(seed, CKCA__STREAM_INIT, base + e) - 1.0));
        } else {
            float value = p->role == CKCA__ROLE_VAR || (p->role == CKCA__ROLE_GAMMA && !node->zero) ? 1.0f : 0.0f;
            for (e = 0; e < p->count; e++) w[e] = value;
        }
    }
}

static ckca_status ckca__allocate_values(ckca_model *m) {
    m->values = (float *)ckca__device_alloc(m->ctx, ckca__mul(m->all, sizeof(float)));
    if (!m->values)
        return ckca__fail(m->ctx, CKCA_ENOMEM, "out of memory for %.1f MB of parameters", (double)m->all * 4e-6);
    m->finished = 1;
    return CKCA_OK;
}

/* Uploads initial weights to device (m->all floats). */
static ckca_status ckca__initialize(ckca_model *m, uint64_t seed, float *device) {
    float *host = (float *)ckca__alloc(m->ctx, m->all * sizeof(float));
    if (!host)
        return ckca__fail(m->ctx, CKCA_ENOMEM, "out of memory for %.1f MB of initial weights", (double)m->all * 4e-6);
    ckca__draw_weights(m, seed, host);
    ckca__device_upload(m->ctx, device, host, m->all * sizeof(float));
    ckca__release(m->ctx, host);
    return ckca__device_status(m->ctx);
}

CKCA_API ckca_status ckca_model_finish(ckca_model *m, int logits) {
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__finish_graph(m, logits))) return status;
    if (!(status = ckca__allocate_values(m)) && !(status = ckca__initialize(m, m->seed, m->values))) return CKCA_OK;
    ckca__device_release(m->ctx, m->values, m->all * sizeof(float)); /* undo, so that the caller may try again */
    m->values = NULL;
    m->node[m->pooled].readers--;
    m->node[m->logits].readers--;
    m->finished = m->logits = m->pooled = m->features = 0;
    return status;
}

/* ---- freezing ---- */

/* 1 if a call with this prefix means node i (see ckca_freeze). */
static int ckca__has_prefix(const ckca_model *m, int i, const char *prefix) {
    const char *name = m->node[i].name;
    const size_t length = prefix ? strlen(prefix) : 0;
    if (!*name) return 0;
    if (!prefix) return i != m->logits;
    return !strncmp(name, prefix, length) &&
           (!length || prefix[length - 1] == '.' || !name[length] || name[length] == '.');
}

static ckca_status ckca__set_rate(ckca_model *m, const char *call, const char *prefix, float rate) {
    ckca__bound bound = {"factor", 0, 0, 1e6, 0};
    const char *first = "", *last = "";
    ckca_status status;
    int i, named = 0, mode;
    if (!m) return CKCA_EINVAL;
    bound.value = (double)rate;
    if ((status = ckca__check_finished(m, call)) || (status = ckca__check_bounds(m->ctx, call, &bound, 1)))
        return status;
    for (i = 0; i < m->nodes; i++) {
        named += ckca__has_prefix(m, i, prefix);
        if (!*m->node[i].name) continue;
        if (!*first) first = m->node[i].name;
        last = m->node[i].name;
    }
    if (!named)
        return ckca__fail(m->ctx, CKCA_EINVAL, "%s: no layer's name begins with \"%.70s\" (they are %s to %s)", call,
                          prefix ? prefix : "", first, last);
    for (i = 0; i < m->nodes; i++)
        if (ckca__has_prefix(m, i, prefix)) m->node[i].rate = rate;
    ckca__device_release(m->ctx, m->gradients, m->trained * sizeof(float));
    ckca__device_release(m->ctx, m->momentum, m->trained * sizeof(float));
    m->gradients = m->momentum = NULL;
    for (mode = 0; mode < CKCA__MODES; mode++)
        if (mode & CKCA__MODE_TRAIN) m->plan_values[mode] = 0;
    m->n = 0; /* its outputs were those of another plan */
    ckca__layout_training(m);
    return CKCA_OK;
}

CKCA_API ckca_status ckca_freeze(ckca_model *m, const char *prefix) {
    return ckca__set_rate(m, "ckca_freeze", prefix, 0);
}

CKCA_API ckca_status ckca_learning_rate(ckca_model *m, const char *prefix, float factor) {
    return ckca__set_rate(m, "ckca_learning_rate", prefix, factor);
}

/* Fails if nothing that the logits depend on is trained. */
static ckca_status ckca__check_trained(const ckca_model *m, const char *call) {
    if (!m->node[m->logits].constant) return CKCA_OK;
    return ckca__fail(m->ctx, CKCA_EINVAL, "%s: all layers are frozen, nothing is left to train (ckca_freeze)", call);
}

/* ---- ResNets ---- */

/* Convolution, batch norm and, if relu, ReLU after node x; conv and bn are their names after prefix ("layer1.0."). */
static int ckca__conv_bn(ckca_model *m, const char *prefix, const char *conv, const char *bn, int x, int out,
                         int kernel, int stride, int groups, int relu) {
    char name[CKCA__NAME_MAX];
    ckca_conv_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.out = out;
    desc.kernel = kernel;
    desc.stride = stride;
    desc.pad = kernel / 2;
    desc.groups = groups;
    snprintf(name, sizeof name, "%s%s", prefix, conv);
    x = ckca_layer_conv(m, name, x, desc);
    snprintf(name, sizeof name, "%s%s", prefix, bn);
    x = ckca_layer_batchnorm(m, name, x);
    return relu ? ckca_layer_relu(m, x) : x;
}

/* One residual block (He et al. 2016, figure 5): basic (two 3x3), or, if bottleneck is above 0, a bottleneck (1x1, 3x3
   of bottleneck times width channels in groups, 1x1 with 4 times width; the 3x3 has the stride, as in torchvision). */
static int ckca__residual_block(ckca_model *m, const char *prefix, int x, int width, int stride, int bottleneck,
                                int groups, int projection, int zero) {
    int in, out = bottleneck ? width * 4 : width, y, shortcut = x;
    if (x < 0) return -1;
    in = m->node[x].c;
    if (bottleneck) {
        y = ckca__conv_bn(m, prefix, "conv1", "bn1", x, width * bottleneck, 1, 1, 0, 1);
        y = ckca__conv_bn(m, prefix, "conv2", "bn2", y, width * bottleneck, 3, stride, groups, 1);
        y = ckca__conv_bn(m, prefix, "conv3", "bn3", y, out, 1, 1, 0, 0);
    } else {
        y = ckca__conv_bn(m, prefix, "conv1", "bn1", x, width, 3, stride, 0, 1);
        y = ckca__conv_bn(m, prefix, "conv2", "bn2", y, out, 3, 1, 0, 0);
    }
    if (y < 0) return -1;
    m->node[y].zero = zero;
    if (stride != 1 || in != out)
        shortcut = projection ? ckca__conv_bn(m, prefix, "downsample.0", "downsample.1", x, out, 1, stride, 0, 0)
                              : ckca_layer_subsample(m, x, stride, out);
    return ckca_layer_relu(m, ckca_layer_add(m, y, shortcut));
}

CKCA_API ckca_status ckca_resnet(ckca_context *ctx, ckca_model **out, const char *arch, const ckca_model_desc *desc) {
    static const struct {
        const char *name;
        int cifar, bottleneck, groups, blocks[4]; /* bottleneck: see ckca__residual_block; blocks per stage */
    } net[] = {{"resnet8", 1, 0, 0, {1, 1, 1, 0}},         {"resnet20", 1, 0, 0, {3, 3, 3, 0}},
               {"resnet32", 1, 0, 0, {5, 5, 5, 0}},        {"resnet44", 1, 0, 0, {7, 7, 7, 0}},
               {"resnet56", 1, 0, 0, {9, 9, 9, 0}},        {"resnet110", 1, 0, 0, {18, 18, 18, 0}},
               {"resnet18", 0, 0, 0, {2, 2, 2, 2}},        {"resnet34", 0, 0, 0, {3, 4, 6, 3}},
               {"resnet50", 0, 1, 0, {3, 4, 6, 3}},        {"resnet101", 0, 1, 0, {3, 4, 23, 3}},
               {"resnet152", 0, 1, 0, {3, 8, 36, 3}},      {"wide_resnet50_2", 0, 2, 0, {3, 4, 6, 3}},
               {"resnext50_32x4d", 0, 2, 32, {3, 4, 6, 3}}};
    const int nets = (int)(sizeof net / sizeof *net);
    size_t length = arch ? strlen(arch) : 0;
    int i, stage, block, x, width, small_stem = 0;
    ckca_model *m = NULL;
    ckca_status status;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!out || !arch || !desc) return ckca__null(ctx, "ckca_resnet", !out ? "model" : !arch ? "arch" : "desc");
    if (length > 6 && !strcmp(arch + length - 6, "-cifar")) {
        small_stem = 1;
        length -= 6;
    }
    for (i = 0; i < nets; i++)
        if (length && strlen(net[i].name) == length && !memcmp(arch, net[i].name, length)) break;
    if (i == nets || (small_stem && net[i].cifar))
        return ckca__fail(ctx, CKCA_EINVAL,
                          "unknown network \"%.40s\"; known are resnet8, 20, 32, 44, 56, 110, 18, 34, 50, 101, 152, "
                          "wide_resnet50_2, resnext50_32x4d, and from resnet18 on the same with -cifar",
                          arch);
    if ((status = ckca_model_create(ctx, &m, desc))) return status;
    snprintf(m->arch, sizeof m->arch, "%s", arch);
    width = desc->width_base ? desc->width_base : net[i].cifar ? 16 : 64;
    x = ckca_layer_input(m);
    x = ckca__conv_bn(m, "", "conv1", "bn1", x, width, net[i].cifar || small_stem ? 3 : 7,
                      net[i].cifar || small_stem ? 1 : 2, 0, 1);
    if (!net[i].cifar && !small_stem) x = ckca_layer_maxpool(m, x, 3, 2, 1);
    for (stage = 0; stage < 4; stage++) {
        for (block = 0; block < net[i].blocks[stage]; block++) {
            char prefix[32];
            snprintf(prefix, sizeof prefix, "layer%d.%d.", stage + 1, block);
            x = ckca__residual_block(m, prefix, x, width << stage, stage && !block ? 2 : 1, net[i].bottleneck,
                                     net[i].groups, !net[i].cifar || desc->projection, desc->zero_residual);
        }
        if (block) ckca_layer_stage(m, x);
    }
    x = ckca_layer_linear(m, "fc", ckca_layer_avgpool(m, x), m->classes);
    if ((status = ckca_model_finish(m, x))) {
        ckca_model_free(m);
        return status;
    }
    *out = m;
    return CKCA_OK;
}

/* ---- the graph as text: "input;conv conv1 0 16 3 1 1 0;bn bn1 1;relu 2;...;stage 2;logits 9" ---- */

/* Writes at most capacity bytes including the final zero; returns the full length without it, as snprintf does. */
static size_t ckca__graph_write(const ckca_model *m, char *out, size_t capacity) {
    size_t length = 0;
    int i, j;
#define CKCA__PUT(...)                                                                                             \
    length += (size_t)snprintf(length < capacity ? out + length : NULL, length < capacity ? capacity - length : 0, \
                               __VA_ARGS__)
    for (i = 0; i < m->nodes; i++) {
        const ckca__node *x = &m->node[i];
        const ckca__layer *layer = &ckca__layers[x->kind];
        CKCA__PUT("%s%s", i ? ";" : "", ckca__kind_name[x->kind]);
        if (x->name[0]) CKCA__PUT(" %s", x->name);
        for (j = 0; j < layer->inputs; j++) CKCA__PUT(" %d", x->in[j]);
        for (j = 0; j < CKCA__LAYER_NUMBERS && layer->number[j]; j++) {
            const int value = *(const int *)(const void *)((const char *)x + layer->number[j]);
            if (layer->optional && !value && (j + 1 == CKCA__LAYER_NUMBERS || !layer->number[j + 1])) break;
            CKCA__PUT(" %d", value);
        }
    }
    for (i = 0; i < m->nodes; i++)
        if (m->node[i].stage) CKCA__PUT(";stage %d", i);
    CKCA__PUT(";logits %d", m->logits);
#undef CKCA__PUT
    return length;
}

/* The kind of this name, or CKCA__KIND_COUNT. */
static int ckca__kind_of(const char *word) {
    int kind = 0;
    while (kind < CKCA__KIND_COUNT && strcmp(ckca__kind_name[kind], word)) kind++;
    return kind;
}

/* Builds the graph of a text, which may be hostile, and finishes it; does not allocate the parameters. */
static ckca_status ckca__graph_read(ckca_model *m, const char *text) {
    enum { NUMBERS = 2 + CKCA__LAYER_NUMBERS }; /* at most: two inputs, then the fields */
    int statement = 0;
    while (*text) {
        char word[2][CKCA__NAME_MAX] = {"", ""}; /* the kind and, where the kind has one, a name */
        int number[NUMBERS], numbers = 0, words = 0, named = 0, done = -1, kind = CKCA__KIND_COUNT;
        const char *end = text + strcspn(text, ";");
        while (text < end) {
            size_t length = strcspn(text, " ;");
            if (*text == ' ' || length >= CKCA__NAME_MAX) break;
            if (words == 2 || (words == 1 && !named)) {
                char *stop;
                long value = strtol(text, &stop, 10); /* stops at ' ', ';' or the final zero */
                if (numbers == NUMBERS || stop != text + length || value < -1 || value > INT_MAX) break;
                number[numbers++] = (int)value;
            } else {
                memcpy(word[words], text, length);
                word[words][length] = 0;
                if (!words++) {
                    kind = ckca__kind_of(word[0]);
                    named = kind < CKCA__KIND_COUNT && ckca__layers[kind].named;
                }
            }
            text += length;
            if (*text == ' ') text++;
        }
        if (text == end && words == 1 + named && kind < CKCA__KIND_COUNT) {
            const ckca__layer *layer = &ckca__layers[kind];
            int wanted = layer->inputs, i;
            for (i = 0; i < CKCA__LAYER_NUMBERS && layer->number[i]; i++) wanted++;
            if (layer->optional && numbers == wanted - 1) number[numbers++] = 0;
            if (numbers == wanted) done = layer->build(m, word[1], number);
        } else if (text == end && words == 1 && numbers == 1) {
            if (!strcmp(word[0], "stage")) done = ckca_layer_stage(m, number[0]);
            if (!strcmp(word[0], "logits") && !*end) return ckca__finish_graph(m, number[0]);
        }
        if (m->failed)
            return ckca__fail(m->ctx, m->failed == CKCA_ENOMEM ? CKCA_ENOMEM : CKCA_EFORMAT, "graph: %s", m->failure);
        if (done < 0)
            return ckca__fail(m->ctx, CKCA_EFORMAT, "graph: statement %d (\"%.20s\") cannot be read", statement + 1,
                              word[0]);
        statement++;
        text = *end ? end + 1 : end;
    }
    return ckca__fail(m->ctx, CKCA_EFORMAT, "graph: it ends after %d statements without logits", statement);
}

/* ---- copies and information ---- */

/* Bytes of a model's class means and counts. */
static size_t ckca__centroid_bytes(const ckca_model *m) {
    return (size_t)m->classes * sizeof(int64_t) + (size_t)m->classes * (size_t)m->features * sizeof(float);
}
/* Allocates class means and counts, all 0, for a model's classes and features. Returns 0 if out of memory. */
static int ckca__centroids_alloc(const ckca_model *m, ckca__centroids *centroids) {
    centroids->count = (int64_t *)ckca__alloc(m->ctx, ckca__centroid_bytes(m));
    centroids->mean = centroids->count ? (float *)(void *)(centroids->count + m->classes) : NULL;
    return centroids->count != NULL;
}

CKCA_API ckca_status ckca_model_copy(ckca_model **out, const ckca_model *m) {
    ckca_context *ctx;
    ckca_model *copy;
    size_t normalization;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    ctx = m->ctx;
    if (!out) return ckca__null(ctx, "ckca_model_copy", "copy");
    if ((status = ckca__check_finished(m, "ckca_model_copy"))) return status;
    normalization = (size_t)m->channels * 2 * sizeof(float);
    copy = (ckca_model *)ckca__alloc(ctx, sizeof *copy);
    if (!copy) return ckca__fail(ctx, CKCA_ENOMEM, "copy: out of memory for the model");
    *copy = *m;
    copy->gradients = copy->momentum = copy->rate = copy->folded = copy->saved = copy->activations = NULL;
    copy->activation_bytes = copy->workspace_bytes = copy->packed_bytes = 0;
    memset(copy->plan_values, 0, sizeof copy->plan_values);
    memset(copy->recompute, 0, sizeof copy->recompute);
    memset(copy->recompute_capacity, 0, sizeof copy->recompute_capacity);
    memset(copy->recomputes, 0, sizeof copy->recomputes);
    copy->workspace = copy->packed_weights = NULL;
    copy->unsaved = NULL;
    copy->centroids.count = NULL;
    copy->folded_valid = copy->frozen_valid = copy->n = 0;
    copy->node = (ckca__node *)ckca__alloc(ctx, m->node_capacity * sizeof *m->node);
    copy->parameter = (ckca__parameter *)ckca__alloc(ctx, m->parameter_capacity * sizeof *m->parameter);
    copy->normalization = (float *)ckca__alloc(ctx, normalization);
    copy->class_names = m->class_names ? ckca__copy_names(ctx, (const char *const *)m->class_names, m->classes) : NULL;
    copy->values = (float *)ckca__device_alloc(ctx, m->all * sizeof(float));
    if (!copy->node || !copy->parameter || !copy->normalization || !copy->values ||
        (m->class_names && !copy->class_names) || (m->centroids.count && !ckca__centroids_alloc(m, &copy->centroids))) {
        ckca_model_free(copy);
        return ckca__fail(ctx, CKCA_ENOMEM, "copy: out of memory for %.1f MB of parameters", (double)m->all * 4e-6);
    }
    memcpy(copy->node, m->node, (size_t)m->nodes * sizeof *m->node);
    memcpy(copy->parameter, m->parameter, (size_t)m->parameters * sizeof *m->parameter);
    memcpy(copy->normalization, m->normalization, normalization);
    if (m->centroids.count) memcpy(copy->centroids.count, m->centroids.count, ckca__centroid_bytes(m));
    ckca__device_copy(ctx, copy->values, m->values, m->all * sizeof(float));
    *out = copy;
    return CKCA_OK;
}

CKCA_API void ckca_model_info_get(const ckca_model *m, ckca_model_info *info) {
    int i;
    if (!info) return;
    memset(info, 0, sizeof *info);
    if (!m) return;
    info->arch = m->arch;
    info->height = m->height;
    info->width = m->width;
    info->channels = m->channels;
    info->classes = m->classes;
    info->features = m->features;
    info->class_names = (const char *const *)m->class_names;
    info->mean = m->normalized ? m->normalization : NULL;
    info->std = m->normalized ? m->normalization + m->channels : NULL;
    info->updates = m->updates;
    info->pictures = m->pictures;
    info->nodes = m->nodes;
    info->logits = m->logits;
    for (i = 0; i < m->parameters; i++)
        if (m->parameter[i].role < CKCA__ROLE_MEAN) info->parameters += (int64_t)m->parameter[i].count;
}

CKCA_API ckca_data_desc ckca_data_like(const ckca_model *m) {
    ckca_data_desc desc;
    memset(&desc, 0, sizeof desc);
    if (!m) return desc;
    desc.height = m->height;
    desc.width = m->width;
    desc.channels = m->channels;
    desc.class_names = (const char *const *)m->class_names;
    desc.classes = m->class_names ? m->classes : 0;
    return desc;
}

/* ===================================================================================================================
   TRAINING                                                                                                    >>train

   Top down: one update and its epochs, one SGD step, the preparation before the first step, batches, evaluation.

   ckca_update is the whole method. ckca__begin prepares it (settings, teacher, starting weights), ckca__train runs the
   epochs, ckca__step_ops is one SGD step, from bytes to new weights.
   =================================================================================================================== */

#define CKCA__EVAL_BATCH (CKCA__DEVICE_IS_HOST ? 64 : 256) /* larger batches use a GPU better */
/* The teacher's outputs on all pictures are cached if they take at most this much memory. */
#define CKCA__CACHE_BYTES ((size_t)256 << 20)
#define CKCA__PICTURES_MAX 1000000000 /* ckca_update_desc.teacher_pictures */

/* Everything but the maps that a batch of up to n pictures needs on the device, in one block of memory. */
typedef struct ckca__batch_buffers {
    void *block;
    size_t bytes;
    /* The input of an SGD step is at the start of the block: one copy uploads it from host. */
    void *host;
    size_t input_bytes;
    float *lr;                      /* 1 value */
    int *epoch;                     /* 1 value */
    int *index, *position, *labels; /* n each; index: in the store, position: in the data set */
    int first_label;                /* is subtracted from the labels */
    /* Only if the store streams: */
    unsigned char *pixels; /* the batch's pictures, in a block of their own */
    size_t pixel_bytes;
    void *staging; /* uploads them, see ckca__device_staging_open */
    /* Only if pictures are read ahead: */
    ckca__feed *feed;
    ckca__feed_batch *fed; /* the batch that ckca__send_batch took */
    /* What the step computes: */
    int *hit;                                 /* n, see ckca__op_cross_entropy */
    float *loss;                              /* n: the value of one term of the loss per picture */
    float *teacher_logits, *teacher_features; /* n x classes, n x features */
    float *class_weight;                      /* classes: AdaKD's weight of each class */
    float *gscale;                            /* 1 value: the factor of the gradient, from clipping */
    double *sums; /* 4: over the epoch so far: cross-entropy, AdaKD, FeatReg, correct predictions */
} ckca__batch_buffers;

/* What the terms of the loss are multiplied by: cross-entropy, AdaKD, FeatReg. */
typedef struct ckca__factors {
    float ce, kd, feat;
} ckca__factors;

typedef struct ckca__update {
    ckca_context *ctx;
    ckca_model *m;
    ckca_model *old;       /* a copy of the model before the update: restored on failure, and the default teacher */
    ckca_model *teacher;   /* old, or a copy of desc->teacher, or NULL if no term of the loss needs one */
    const ckca_data *data; /* what is trained on: the chunk, joined with the memory's pictures if there are any */
    const ckca_data *chunk; /* the new pictures that are trained on */
    ckca_data *joined;      /* data if it is not chunk */
    const ckca_data *test;  /* the held-out pictures that old and new network are compared on; NULL: none */
    const ckca_data *pick; /* with patience: the held-out pictures that choose the epoch; NULL: the last one is chosen */
    ckca_data *view[4];    /* which of chunk, test and pick this update created */
    ckca_model *candidate, *best; /* with patience: the weights after this epoch, and those of the best one so far */
    int best_right;               /* pictures of pick that best is right on; -1: no epoch so far */
    double best_loss;
    ckca_report report;     /* the verdict */
    ckca_update_desc d;     /* with all defaults set and planned in time; unused terms of the loss have weight 0 */
    ckca_update_desc asked; /* d before ckca__shorten */
    double start;           /* of the call, in seconds */
    int mode;               /* of the student's forward pass */
    /* The teacher's outputs on all pictures, count x classes and count x features; NULL: computed for each batch. */
    float *cache_logits, *cache_features;
    size_t cache_logits_bytes, cache_features_bytes;
    /* AdaKD over the first known classes alone (fewer than all after ckca_add_classes), see ckca__known_term: */
    int known, *known_from, *known_to;
    float *known_student, *known_teacher, *known_gradient, *known_wide;
    int separate; /* 1: cross-entropy over the other classes alone, see ckca__new_term */
    int *new_from, *new_to;
    float *new_logits, *new_gradient;
    void *known_block;
    size_t known_bytes;
    float *own_features; /* the student's features of all pictures, count x features, if they are frozen; or NULL */
    size_t own_features_bytes;
    const float *teacher_logits, *teacher_features; /* for the current batch: n x classes, n x features */
    ckca__factors factors;
    float *centroids; /* CENTROID's class means, classes x features, on the device; NULL with other forms */
    size_t centroid_bytes;
    ckca__centroids learnt; /* the class means after the update, until the model takes them over */
    /* Pictures without labels: desc->unlabelled, or NULL without AdaKD; their part of a batch follows the others. */
    const ckca_data *unlabelled;
    ckca__batch_buffers unlabelled_buffers;
    int *unlabelled_order; /* a permutation of unlabelled->count positions, then batch positions of the current step */
    int64_t unlabelled_pass; /* which pass over them has that permutation; -1: none yet */
    ckca__batch_buffers buffers;
    int *order;         /* data->count positions: the epoch's permutation */
    int part;           /* the most pictures of a batch that this rank takes; one process: d.batch */
    float share;        /* this rank's pictures over those of the current batch */
    int states;         /* 1: training states are written (by rank 0, which alone has d.state) */
    int *ahead_order;   /* likewise, of the epoch that is read ahead; only with a feed */
    int ahead_epoch, ahead_batch; /* the next batch to be read ahead */
    int batches;        /* per epoch */
    int epoch, batch;   /* of the next SGD step, both from 0 */
    int correct;        /* correct predictions of this epoch, as of the last ckca__fetch_sums */
    double sums[3];     /* likewise: cross-entropy, AdaKD, FeatReg */
    void *recording[2]; /* of the SGD step for a full batch, and for a last, smaller one */
    double teacher_accuracy;
    uint64_t fingerprint;   /* a hash of everything that the result depends on */
    ckca__unsaved *unsaved; /* the training state's paths, until the model takes them over */
    int lock;               /* file descriptor of the training state's .lock, or -1 */
} ckca__update;

/* The numeric fields of ckca_update_desc in their order: the only list behind defaults, range checks (also ckca_sgd's)
   and the fingerprint and text of a training state. tests/test_train.c fails if a field is missing. Defaults that
   depend on other fields are in ckca_update_defaults. */
typedef struct ckca__setting {
    const char *name;
    size_t offset;       /* in ckca_update_desc */
    int real;            /* 1: a float, 0: an int or an enum */
    float default_value; /* what 0 means */
    double least, most;  /* allowed range */
    int off;             /* 1: may be CKCA_OFF */
    int affects_result;  /* 1: part of the fingerprint */
} ckca__setting;

/* clang-format off */
#define CKCA__AT(field) #field, offsetof(ckca_update_desc, field)
static const ckca__setting ckca__settings[] = {
    /*                               real  default  least  most                       off  affects_result */
    {CKCA__AT(method),                0,    0,       0,     CKCA_METHOD_COUNT - 1,     0,   1},
    {CKCA__AT(adakd),                 0,    0,       0,     CKCA_ADAKD_COUNT - 1,      0,   1},
    {CKCA__AT(featreg),               0,    0,       0,     CKCA_FEATREG_COUNT - 1,    0,   1},
    {CKCA__AT(w_kd),                  1,    1,       0,     1e6,                       1,   1},
    {CKCA__AT(w_feat),                1,    1,       0,     1e6,                       1,   1},
    {CKCA__AT(temperature),           1,    2,       0,     1e6,                       0,   1},
    {CKCA__AT(teacher_pictures),      0,    0,       0,     CKCA__PICTURES_MAX,        0,   1},
    {CKCA__AT(shrink),                1,    0.4f,    0,     1,                         1,   1},
    {CKCA__AT(perturb),               1,    0.1f,    0,     1e6,                       1,   1},
    {CKCA__AT(ewc_lambda),            1,    1,       0,     1e9,                       1,   1},
    {CKCA__AT(epochs),                0,    40,      0,     1e6,                       0,   1},
    {CKCA__AT(batch),                 0,    64,      0,     CKCA__BATCH_MAX,           0,   1},
    {CKCA__AT(lr),                    1,    0.1f,    0,     1e6,                       0,   1},
    {CKCA__AT(schedule),              0,    0,       0,     CKCA_SCHEDULE_COUNT - 1,   0,   1},
    {CKCA__AT(warmup_epochs),         1,    1,       0,     1e6,                       1,   1},
    {CKCA__AT(step_epochs),           1,    0,       0,     1e6,                       0,   1},
    {CKCA__AT(step_factor),           1,    0.1f,    0,     1,                         0,   1},
    {CKCA__AT(momentum),              1,    0.9f,    0,     1,                         1,   1},
    {CKCA__AT(weight_decay),          1,    5e-4f,   0,     1e6,                       1,   1},
    {CKCA__AT(clip_norm),             1,    0,       0,     1e30,                      1,   1},
    {CKCA__AT(no_nesterov),           0,    0,       0,     1,                         0,   1},
    {CKCA__AT(label_smoothing),       1,    0,       0,     1,                         1,   1},
    {CKCA__AT(holdout),               1,    0,       0,     0.9,                       1,   1},
    {CKCA__AT(keep_better),           1,    0.25f,   0,     1,                         1,   1},
    {CKCA__AT(patience),              0,    0,       0,     1e6,                       0,   1},
    {CKCA__AT(augment.pad),           0,    0,       0,     4096,                      0,   1},
    {CKCA__AT(augment.flip),          0,    0,       0,     1,                         0,   1},
    {CKCA__AT(augment.resized_crop),  0,    0,       0,     1,                         0,   1},
    {CKCA__AT(augment.crop_min),      1,    0,       0,     1,                         0,   1},
    {CKCA__AT(augment.jitter),        1,    0,       0,     1,                         0,   1},
    {CKCA__AT(seconds),               1,    0,       0,     1e9,                       0,   1},
    {CKCA__AT(memory_mb),             1,    0,       0,     1e9,                       0,   1},
    {CKCA__AT(state_seconds),         1,    30,      0,     1e9,                       0,   0},
};
#undef CKCA__AT
/* clang-format on */
enum { CKCA__SETTINGS = sizeof ckca__settings / sizeof *ckca__settings };

static double ckca__setting_get(const ckca_update_desc *d, const ckca__setting *s) {
    const char *field = (const char *)d + s->offset;
    float real;
    int whole;
    memcpy(&real, field, sizeof real);
    memcpy(&whole, field, sizeof whole);
    return s->real ? (double)real : (double)whole;
}
static void ckca__setting_set(ckca_update_desc *d, const ckca__setting *s, float value) {
    const int whole = (int)value;
    if (s->real)
        memcpy((char *)d + s->offset, &value, sizeof value);
    else
        memcpy((char *)d + s->offset, &whole, sizeof whole);
}

static ckca_status ckca__settings_check(ckca_context *ctx, const char *call, const ckca_update_desc *d) {
    ckca_status status = CKCA_OK;
    int i;
    for (i = 0; !status && i < CKCA__SETTINGS; i++) {
        const ckca__setting *s = &ckca__settings[i];
        ckca__bound bound;
        bound.name = s->name;
        bound.value = ckca__setting_get(d, s);
        bound.least = s->least;
        bound.most = s->most;
        bound.off = s->off;
        status = ckca__check_bounds(ctx, call, &bound, 1);
    }
    return status;
}

/* Replaces zeros with their defaults. */
static void ckca__settings_apply_defaults(ckca_update_desc *d) {
    int i;
    for (i = 0; i < CKCA__SETTINGS; i++)
        if (ckca__setting_get(d, &ckca__settings[i]) == 0)
            ckca__setting_set(d, &ckca__settings[i], ckca__settings[i].default_value);
}

/* Then replaces CKCA_OFF with 0, which is what the arithmetic needs. */
static void ckca__settings_resolve_off(ckca_update_desc *d) {
    int i;
    for (i = 0; i < CKCA__SETTINGS; i++)
        if (ckca__settings[i].off && ckca__setting_get(d, &ckca__settings[i]) < 0)
            ckca__setting_set(d, &ckca__settings[i], 0);
}

/* The forms of AdaKD. */
static const struct {
    const char *name;
    float w_kd;   /* the default weight */
    int by_class; /* 1: a_i is the teacher's accuracy on the class of picture i, or with grows a factor of it */
    int grows;    /* 1: a_i is g(n_old / n_new) */
} ckca__adakds[CKCA_ADAKD_COUNT] = {{"GROWTH", 1, 0, 1}, {"CONSTANT", 1, 0, 0}, {"CLASS", 2, 1, 0}};

/* The forms of FeatReg; ckca__op_featreg computes them. */
static const struct {
    const char *name;
    int stages; /* 1: compares stages' maps; both networks need the same stages; the teacher runs on each batch */
    int same_features; /* 1: student and teacher need the same number of features */
    int centroids;     /* 1: compares features with class means, not with the teacher's */
} ckca__featregs[CKCA_FEATREG_COUNT] = {{"CENTROID", 0, 1, 1}, {"STAGES", 1, 0, 0}, {"COSINE", 0, 1, 0}};

/* 1 if the loss compares the stages' maps. */
static int ckca__uses_stages(const ckca__update *u) { return u->d.w_feat > 0 && ckca__featregs[u->d.featreg].stages; }
/* 1 if it compares features with class means. */
static int ckca__uses_centroids(const ckca__update *u) {
    return u->d.w_feat > 0 && ckca__featregs[u->d.featreg].centroids;
}
/* 1 if it compares features with the teacher's. */
static int ckca__uses_features(const ckca__update *u) {
    return u->d.w_feat > 0 && !ckca__featregs[u->d.featreg].stages && !ckca__featregs[u->d.featreg].centroids;
}
/* The pictures of an SGD step on n labelled ones. */
static int ckca__step_pictures(const ckca__update *u, int n) { return u->unlabelled ? 2 * n : n; }

/* Below: */
static ckca_status ckca__train(ckca__update *u, double start);
static ckca_status ckca__end_epoch(ckca__update *u, int *stop);
static ckca_status ckca__compare(ckca__update *u);
static ckca_status ckca__hold_out(ckca__update *u);
static ckca_status ckca__report_progress(ckca__update *u, int seen, double seconds, int64_t steps);
static void ckca__fill_report(const ckca__update *u, double seconds, ckca_report *report);
static ckca_status ckca__train_step(ckca__update *u, const int *position, int n);
static void ckca__step_ops(ckca__update *u, int n);
static void ckca__set_factors(ckca__update *u);
static double ckca__loss(const ckca__update *u, int seen);
static ckca_status ckca__send_unlabelled(ckca__update *u, int offset, int n);
static void ckca__teacher_outputs(ckca__update *u, int n, const float *input);
static void ckca__distillation_term(ckca__update *u, int n);
static void ckca__distil(ckca__update *u, int first, int n, const int *labels, const float *class_weight);
static void ckca__known_term(ckca__update *u, int n, const float *student, const float *teacher, const int *labels,
                             const float *class_weight, float *dlogits);
static void ckca__new_term(ckca__update *u, int n, const float *logits, float *dlogits);
static ckca_status ckca__prepare_known(ckca__update *u);
static void ckca__feature_term(ckca__update *u, int n);
static void ckca__ewc_term(ckca__update *u, int n);
static float ckca__learning_rate(const ckca_update_desc *d, int64_t s, int batches);
static ckca_status ckca__fetch_sums(ckca__update *u, ckca_status status, int *save);
static ckca_status ckca__check_loss(const ckca__update *u);
static ckca_status ckca__check_all_finite(const ckca_model *m, const char *what, int momentum);
static ckca_status ckca__begin(ckca__update *u, const ckca_update_desc *desc);
static ckca_status ckca__check_teacher(const ckca__update *u, const ckca_model *t);
static int ckca__same_stages(const ckca_model *m, const ckca_model *t);
static int ckca__fits_featreg(const ckca_model *m, const ckca_model *t, ckca_featreg form);
static ckca_status ckca__prepare_unlabelled(ckca__update *u);
static ckca_status ckca__prepare_centroids(ckca__update *u, const double *sums);
static ckca_status ckca__learn_centroids(ckca__update *u);
static ckca_status ckca__average_features(const ckca_model *m, const ckca__centroids *before, const double *sums,
                                          const ckca_data *data, ckca__centroids *after);
static ckca_status ckca__prepare_teacher(ckca__update *u);
static int ckca__augments(const ckca_augment *a);
static ckca_status ckca__cache_features(ckca__update *u);
static int ckca__has_momentum(const ckca_model *m, const ckca__parameter *p);
static ckca_status ckca__starting_weights(ckca__update *u);
static ckca_status ckca__fit_memory(const ckca_model *model, const ckca_data *data, ckca_update_desc *d);
static ckca_status ckca__fit_time(ckca__update *u);
static void ckca__shorten(ckca__update *u, int epochs);
static ckca_status ckca__fingerprint(ckca__update *u);
static ckca_status ckca__hash_weights(const ckca_model *m, size_t count, uint64_t *hash);
static ckca_status ckca__compare_ranks(ckca__update *u);
static ckca_status ckca__share_state(ckca__update *u, ckca_status status, int *found);
static void ckca__make_batch(const ckca_model *m, const ckca_data *data, int n, const ckca_augment *augment,
                             uint64_t seed, const ckca__batch_buffers *b, float *input);
static void ckca__unbind_data(ckca_model *m, int had_names, int was_normalized);
static ckca_status ckca__send_batch(ckca_context *ctx, const ckca_data *data, const int *position, int n, int epoch,
                                    float lr, ckca__batch_buffers *b);
static ckca_status ckca__prepare_store(ckca_context *ctx, ckca__store *store, int n, ckca__batch_buffers *b);
static ckca_status ckca__prepare_data(ckca_context *ctx, const ckca_data *data, int n, const ckca_augment *augment,
                                      uint64_t seed, int (*plan)(void *user, int *position, int *epoch), void *user,
                                      ckca__batch_buffers *b);
static int ckca__plan_training(void *user, int *position, int *epoch);
static ckca_status ckca__prepare_upload(ckca_context *ctx, const ckca__store *store, int n, ckca__batch_buffers *b);
static void *ckca__host_input(const ckca__batch_buffers *b, const void *device);
static ckca_status ckca__batch_buffers_alloc(ckca_context *ctx, ckca__batch_buffers *b, int n, int classes,
                                             int features);
static void ckca__batch_buffers_free(ckca_context *ctx, ckca__batch_buffers *b);
static ckca_status ckca__evaluate_all(ckca_model *m, const ckca_model *like, const ckca_data *data, ckca_score *score,
                                      float *per_class, int *right, float *cache_logits, float *cache_features,
                                      double *class_sums);
static ckca_status ckca__bind_data(ckca_model *m, const ckca_data *data, const char *what);
static ckca_status ckca__measure_pictures(ckca_model *m, const ckca_data *data);

/* In EXECUTION: */
static float *ckca__value(const ckca_model *m, int i);
static float *ckca__grad(const ckca_model *m, int i);
static float *ckca__input_buffer(ckca_model *m, int n, int mode);
static void ckca__run_forward(ckca_model *m, int n, int mode, const float *input);
static void ckca__run_backward(ckca_model *m);
static ckca_status ckca__prepare_frozen(ckca_model *m);
static int ckca__accumulates(ckca_model *m, int i);
static void ckca__clear_has_grad(ckca_model *m);
static void ckca__run_sgd(ckca_model *m, const ckca_sgd_desc *d, const float *lr, float *gscale);

/* In RANKS: */
static int ckca__part(const ckca_context *ctx, int n, int rank);
static void ckca__sum_gradients(ckca_model *m, float share);
static ckca_status ckca__ranks_agree_on(ckca_context *ctx, const char *call, ckca_status status, double *sums);
static ckca_status ckca__ranks_same(ckca_context *ctx, const char *call, const char *what, uint64_t value);
static ckca_status ckca__ranks_same_number(ckca_context *ctx, const char *call, const char *what, double value);
static ckca_status ckca__ranks_sum_counts(ckca_context *ctx, const char *call, int *counts, int n);
static ckca_status ckca__ranks_sum_values(ckca_context *ctx, const char *call, double *values, size_t n);
static ckca_status ckca__ranks_copy(ckca_context *ctx, const char *call, float *values, size_t count);

/* In MEMORY PLAN: */
static ckca_status ckca__mode_bytes(const ckca_model *model, int n, int mode, size_t *bytes);
static ckca_status ckca__reserve(ckca_model *m, int n, int mode);
static int ckca__arena(ckca_context *ctx, void **arena, size_t *capacity, size_t bytes);

/* In MEMORY OF EARLIER CHUNKS: */
static int ckca__memory_count(const ckca_memory *memory);
static ckca_status ckca__memory_needed(const ckca_model *m, const ckca_update_desc *d);
static ckca_status ckca__memory_join(ckca__update *u);
static ckca_status ckca__memory_refill(ckca_memory *memory, ckca_model *m, const ckca_data *chunk,
                                       const ckca_data *joined, int updates);
static int ckca__memory_penalizes(const ckca__update *u);
static const float *ckca__memory_fisher(const ckca_memory *memory);
static ckca_status ckca__memory_hash(const ckca__update *u, uint64_t *hash);

/* In CHECKPOINTS: */
static ckca_status ckca__state_save(ckca__update *u);
static ckca_status ckca__state_open(ckca__update *u);
static void ckca__state_close(ckca__update *u, int done, int discard);
static ckca_status ckca__state_load(ckca__update *u, int *found);

/* ---- one update: preparation, epochs, restoring on failure ---- */

CKCA_API ckca_status ckca_update(ckca_model *m, const ckca_data *data, const ckca_update_desc *desc,
                                 ckca_report *report) {
    const double start = ckca__seconds();
    ckca__update update, *u = &update;
    ckca_status status;
    int had_names, was_normalized, i;
    if (!m) return CKCA_EINVAL;
    m->ctx->agreed = 0;
    status = ckca__check_finished(m, "ckca_update");
    if (!status && !data) status = ckca__null(m->ctx, "ckca_update", "data");
    memset(u, 0, sizeof *u);
    if (!status && m->updates == INT_MAX)
        status = ckca__fail(m->ctx, CKCA_EINVAL, "ckca_update: the model has had %d updates, no more can be counted",
                            INT_MAX);
    if ((status = ckca__ranks_agree(m->ctx, "ckca_update", status))) return status;
    u->ctx = m->ctx;
    u->m = m;
    u->data = u->chunk = data;
    u->start = start;
    u->best_right = -1;
    u->report.p = 1;
    u->teacher_accuracy = -1;
    u->lock = -1;
    u->unlabelled_pass = -1;
    had_names = m->class_names != NULL;
    was_normalized = m->normalized;
    if ((status = ckca_model_copy(&u->old, m))) return ckca__ranks_agree(m->ctx, "ckca_update", status);
    u->old->gradients = m->gradients; /* kept to be restored on failure; training allocates its own */
    u->old->momentum = m->momentum;
    m->gradients = m->momentum = NULL;
    status = ckca__ranks_agree(u->ctx, "ckca_update", ckca__begin(u, desc));
    if (!status) status = ckca__train(u, start);
    if (u->ctx->ranks.size > 1 && (!status || status == CKCA_ESTOP)) { /* the running statistics of rank 0 */
        const ckca_status stopped = status;
        u->ctx->agreed = 0;
        status = ckca__ranks_copy(u->ctx, "ckca_update", m->values + m->trainable, m->all - m->trainable);
        if (!status) {
            status = ckca__ranks_agree(u->ctx, "ckca_update", ckca__device_status(u->ctx));
            if (!status) status = stopped;
        }
        m->folded_valid = 0;
    }
    ckca__device_forget(u->ctx, &u->recording[0]);
    ckca__device_forget(u->ctx, &u->recording[1]);
    if (!status) status = ckca__ranks_agree(u->ctx, "ckca_update", ckca__compare(u));
    if (!status && !u->report.kept_old) status = ckca__ranks_agree(u->ctx, "ckca_update", ckca__learn_centroids(u));
    if (!status && !u->report.kept_old && u->d.memory)
        status = ckca__ranks_agree(u->ctx, "ckca_update",
                                   ckca__memory_refill(u->d.memory, m, u->chunk, u->data, m->updates + 1));
    if (!status && !u->report.kept_old) {
        const ckca__centroids before = m->centroids;
        if (u->d.method == CKCA_METHOD_SCRATCH || m->updates == 0)
            m->pictures = 0;
        else if (m->pictures == 0) /* a checkpoint of another program */
            m->pictures = u->d.teacher && u->d.teacher != m ? u->chunk->count : u->d.teacher_pictures;
        m->pictures += u->chunk->count;
        if (m->pictures > CKCA__COUNT_MAX) m->pictures = CKCA__COUNT_MAX;
        m->centroids = u->learnt;
        u->learnt = before; /* to be released */
        m->updates++;
        m->known = 0;
    } else if (status == CKCA_ESTOP) { /* earlier training states no longer hold this model's weights */
        ckca__forget_unsaved(m);
    } else { /* restore the model */
        float *gradients = m->gradients, *momentum = m->momentum;
        m->gradients = u->old->gradients;
        m->momentum = u->old->momentum;
        u->old->gradients = gradients;
        u->old->momentum = momentum;
        ckca__device_copy(u->ctx, m->values, u->old->values, m->all * sizeof(float));
        m->batches_tracked = u->old->batches_tracked;
        m->folded_valid = m->frozen_valid = 0;
        m->n = 0; /* the caller's last forward pass has been overwritten */
        ckca__unbind_data(m, had_names, was_normalized);
    }
    ckca__state_close(u, !status, u->report.kept_old);
    if (report) ckca__fill_report(u, ckca__seconds() - start, report);
    ckca__device_release(u->ctx, u->cache_logits, u->cache_logits_bytes);
    ckca__device_release(u->ctx, u->cache_features, u->cache_features_bytes);
    ckca__device_release(u->ctx, u->centroids, u->centroid_bytes);
    ckca__device_release(u->ctx, u->own_features, u->own_features_bytes);
    ckca__device_release(u->ctx, u->known_block, u->known_bytes);
    ckca__batch_buffers_free(u->ctx, &u->buffers);
    ckca__batch_buffers_free(u->ctx, &u->unlabelled_buffers);
    ckca__release(u->ctx, u->learnt.count);
    ckca__release(u->ctx, u->unlabelled_order);
    ckca__release(u->ctx, u->order);
    m->evaluation_batch = 0;
    ckca_data_free(u->joined);
    ckca__release(u->ctx, u->ahead_order);
    if (u->teacher != u->old) ckca_model_free(u->teacher);
    ckca_model_free(u->old);
    ckca_model_free(u->candidate);
    ckca_model_free(u->best);
    for (i = 0; i < 4; i++) ckca_data_free(u->view[i]);
    return status;
}

/* Runs all SGD steps from (u->epoch, u->batch) on: shuffles every epoch, reports progress, saves training states. */
static ckca_status ckca__train(ckca__update *u, double start) {
    const int count = u->data->count, size = u->d.batch;
    double saved = start, now;
    int64_t steps = 0; /* SGD steps of this call */
    int stop = 0;
    char what[64];
    ckca_status status = CKCA_OK;
    u->ahead_epoch = u->epoch;
    u->ahead_batch = u->batch;
    if (u->ahead_order) ckca_shuffle(u->d.seed, u->epoch, count, u->ahead_order);
    for (; u->epoch < u->d.epochs; u->epoch++, u->batch = 0) {
        ckca_shuffle(u->d.seed, u->epoch, count, u->order);
        if (u->batch == 0) {
            u->correct = 0;
            memset(u->sums, 0, sizeof u->sums);
            ckca__device_zero(u->ctx, u->buffers.sums, 4 * sizeof *u->buffers.sums);
        }
        while (u->batch < u->batches) {
            const int first = u->batch * size, n = count - first < size ? count - first : size;
            const int from = ckca__part(u->ctx, n, u->ctx->ranks.rank);
            const int to = ckca__part(u->ctx, n, u->ctx->ranks.rank + 1);
            int save;
            u->share = (float)(to - from) / (float)n;
            status = ckca__train_step(u, u->order + first + from, to - from);
            if (status && u->ctx->ranks.size < 2) return status;
            /* The state after the last step holds the result until ckca_save has written it. */
            save = u->d.state && (ckca__seconds() - saved >= (double)u->d.state_seconds ||
                                  (u->epoch + 1 == u->d.epochs && u->batch + 1 == u->batches));
            /* Free on the host; on a GPU it waits for all queued work. */
            if ((CKCA__DEVICE_IS_HOST || u->d.progress || save || u->batch + 1 == u->batches ||
                 u->ctx->ranks.size > 1) &&
                (status = ckca__fetch_sums(u, status, &save)))
                return status;
            u->batch++;
            steps++;
            now = ckca__seconds();
            if (u->d.progress) status = ckca__report_progress(u, first + n, now - start, steps);
            status = ckca__ranks_agree(u->ctx, "ckca_update", status);
            if (u->states && (status || save)) {
                ckca_status saving = u->d.state ? ckca__state_save(u) : CKCA_OK;
                u->ctx->agreed = 0;
                if ((saving = ckca__ranks_agree(u->ctx, "ckca_update", saving))) return saving;
                u->ctx->agreed = status != CKCA_OK;
                saved = ckca__seconds();
            }
            if (status) return status;
        }
        if (u->ctx->ranks.size > 1) {
            uint64_t hash = 0;
            status = ckca__hash_weights(u->m, u->m->trainable, &hash);
            if (!(status = ckca__ranks_agree(u->ctx, "ckca_update", status)))
                status = ckca__ranks_same(u->ctx, "ckca_update", "weights after an epoch (the sums were not the same)",
                                          hash);
            if (status) return status;
        }
        if (u->pick && (status = ckca__end_epoch(u, &stop))) return status;
        if (stop) break;
    }
    if (u->pick) {
        ckca__device_copy(u->ctx, u->m->values, u->best->values, u->m->all * sizeof(float));
        u->m->folded_valid = 0;
    }
    snprintf(what, sizeof what, "update %d, peak learning rate %g", u->m->updates + 1, (double)u->d.lr);
    return ckca__ranks_agree(u->ctx, "ckca_update", ckca__check_all_finite(u->m, what, 0));
}

/* A plan: the batches of the coming SGD steps, epoch after epoch. */
static int ckca__plan_training(void *user, int *position, int *epoch) {
    ckca__update *u = (ckca__update *)user;
    const int count = u->data->count, size = u->d.batch, rank = u->ctx->ranks.rank;
    int first, n, from;
    do { /* a rank may have no picture of a small batch */
        if (u->ahead_batch == u->batches) {
            u->ahead_batch = 0;
            u->ahead_epoch++;
            if (u->ahead_epoch < u->d.epochs) ckca_shuffle(u->d.seed, u->ahead_epoch, count, u->ahead_order);
        }
        if (u->ahead_epoch >= u->d.epochs) return 0;
        first = u->ahead_batch++ * size;
        n = count - first < size ? count - first : size;
        from = ckca__part(u->ctx, n, rank);
        n = ckca__part(u->ctx, n, rank + 1) - from;
    } while (n == 0);
    memcpy(position, u->ahead_order + first + from, (size_t)n * sizeof *position);
    *epoch = u->ahead_epoch;
    return n;
}

/* Calls the progress callback. seen: pictures of this epoch so far; seconds, steps: of this call. Returns CKCA_ESTOP if
   the callback asks to stop. */
static ckca_status ckca__report_progress(ckca__update *u, int seen, double seconds, int64_t steps) {
    const int64_t left = (int64_t)(u->d.epochs - u->epoch) * u->batches - u->batch;
    ckca_progress p;
    p.update = u->m->updates + 1;
    p.epoch = u->epoch;
    p.epochs = u->d.epochs;
    p.batch = u->batch;
    p.batches = u->batches;
    p.lr = ckca__learning_rate(&u->d, (int64_t)u->epoch * u->batches + u->batch - 1, u->batches);
    p.kd = u->sums[1] / seen;
    p.feat = u->sums[2] / seen;
    p.loss = ckca__loss(u, seen);
    p.accuracy = (double)u->correct / seen;
    p.seconds = seconds;
    p.seconds_left = seconds / (double)steps * (double)left;
    p.w_kd = (double)u->factors.kd;
    p.waiting = u->buffers.feed && seconds > 0 ? u->buffers.feed->waited / seconds : 0;
    if (!u->d.progress(&p, u->d.user)) return CKCA_OK;
    return ckca__fail(u->ctx, CKCA_ESTOP, "update %d was stopped in epoch %d, after batch %d of %d", p.update,
                      p.epoch + 1, p.batch, p.batches);
}

static void ckca__fill_report(const ckca__update *u, double seconds, ckca_report *report) {
    /* After the last epoch, epoch is epochs, batch is 0, and the sums are the last epoch's. */
    const int done = u->epoch >= u->d.epochs, batch = done ? u->batches : u->batch;
    const int seen = batch * u->d.batch < u->data->count ? batch * u->d.batch : u->data->count;
    *report = u->report;
    if (!u->pick) report->best_epoch = done ? u->epoch - 1 : u->epoch;
    report->updates = u->m->updates;
    report->steps = u->epoch * u->batches + u->batch;
    report->epochs = u->d.epochs;
    report->teacher_accuracy = u->teacher_accuracy;
    report->seconds = seconds;
    report->w_kd = (double)u->factors.kd;
    report->waiting = u->buffers.feed && seconds > 0 ? u->buffers.feed->waited / seconds : 0;
    if (seen < 1) return;
    report->kd = u->sums[1] / seen;
    report->feat = u->sums[2] / seen;
    report->loss = ckca__loss(u, seen);
    report->accuracy = (double)u->correct / seen;
}

/* The mean loss over the seen pictures of this epoch. */
static double ckca__loss(const ckca__update *u, int seen) {
    const ckca__factors *f = &u->factors;
    return ((double)f->ce * u->sums[0] + (double)f->kd * u->sums[1] + (double)f->feat * u->sums[2]) / seen;
}

/* ---- never worse: the best epoch, the old network against the new one ---- */

/* After an epoch, with patience: evaluates the weights on the pictures that choose the epoch and keeps them if they are
   the best so far: right on more pictures, or on as many with a lower loss. *stop: patience is at its end. */
static ckca_status ckca__end_epoch(ckca__update *u, int *stop) {
    ckca_model *c = u->candidate;
    ckca_score score;
    ckca_status status;
    int right;
    ckca__device_copy(u->ctx, c->values, u->m->values, c->all * sizeof(float));
    c->folded_valid = 0;
    if ((status = ckca__evaluate_all(c, u->m, u->pick, &score, NULL, NULL, NULL, NULL, NULL))) return status;
    right = (int)(score.top1 * score.count + 0.5);
    if (right > u->best_right || (right == u->best_right && score.loss < u->best_loss)) {
        u->candidate = u->best;
        u->best = c;
        u->best_right = right;
        u->best_loss = score.loss;
        u->report.best_epoch = u->epoch;
    }
    *stop = u->epoch - u->report.best_epoch >= u->d.patience;
    /* It holds the result, as that after the last step does; a run that resumes from it comes here first. */
    return *stop && u->d.state ? ckca__state_save(u) : CKCA_OK;
}

/* McNemar's exact test (Psychometrika 12, 1947), two-sided: the probability that won + lost fair coins show a difference
   of at least that between won and lost. */
static double ckca__mcnemar(int won, int lost) {
    const double n = (double)won + lost, fewer = won < lost ? won : lost;
    double term = -n * 0.69314718055994531, sum = 0, i; /* log of the probability of i heads */
    for (i = 1; i <= fewer; i++) term += log((n - i + 1) / i);
    term = exp(term);
    for (i = fewer; i >= 0; i--) {
        sum += term;
        term *= i / (n - i + 1);
    }
    return won == lost || sum > 0.5 ? 1 : 2 * sum;
}

/* Compares the old and the new network on the held-out pictures; keep_better decides which of them the model stays. */
static ckca_status ckca__compare(ckca__update *u) {
    ckca_report *r = &u->report;
    const float level = u->d.keep_better > 0 ? u->d.keep_better : 0.25f;
    int *right, i;
    ckca_status status;
    if (!u->test) return CKCA_OK;
    right = (int *)ckca__alloc(u->ctx, ckca__mul(2 * sizeof(int), (size_t)u->test->count));
    if (!right)
        return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for a test on %d pictures", u->test->count);
    status = ckca__evaluate_all(u->old, u->m, u->test, &r->before, NULL, right, NULL, NULL, NULL);
    if (!status)
        status = ckca__evaluate_all(u->m, u->m, u->test, &r->after, NULL, right + u->test->count, NULL, NULL, NULL);
    for (i = 0; !status && i < u->test->count; i++) {
        r->won += right[i] < right[u->test->count + i];
        r->lost += right[i] > right[u->test->count + i];
    }
    ckca__release(u->ctx, right);
    if (status) return status;
    r->p = ckca__mcnemar(r->won, r->lost);
    r->verdict = r->won == r->lost || r->p > (double)level ? CKCA_VERDICT_UNDECIDED
                 : r->won > r->lost                        ? CKCA_VERDICT_BETTER
                                                           : CKCA_VERDICT_WORSE;
    r->kept_old = u->d.keep_better > 0 && r->verdict != CKCA_VERDICT_BETTER;
    return CKCA_OK;
}

/* ---- one SGD step: input, forward, losses, backward, SGD; the learning rate; checks for NaN ---- */

/* One SGD step on the pictures position[0..n) of the data set. Several processes: n may be 0, and the sums over ranks
   are made whatever fails. */
static ckca_status ckca__train_step(ckca__update *u, const int *position, int n) {
    const int64_t step = (int64_t)u->epoch * u->batches + u->batch;
    void **recording = &u->recording[n < u->d.batch];
    ckca_status status = ckca__send_batch(u->ctx, u->data, position, n, u->epoch,
                                          ckca__learning_rate(&u->d, step, u->batches), &u->buffers);
    if (!status && u->unlabelled) status = ckca__send_unlabelled(u, (int)(position - u->order), n);
    if (u->ctx->ranks.size > 1) { /* sums over ranks cannot be recorded; after a failure this rank adds nothing */
        ckca__step_ops(u, status ? 0 : n);
        return status ? status : ckca__device_status(u->ctx);
    }
    if (status) return status;
    if (ckca__device_record(u->ctx, recording)) {
        ckca__step_ops(u, n);
        ckca__device_recorded(u->ctx, recording);
    } else { /* replayed: only the host's side of ckca__run_forward and ckca__run_sgd is left to do */
        u->m->n = ckca__step_pictures(u, n);
        u->m->mode = u->mode;
        u->m->input = ckca__input_buffer(u->m, u->m->n, u->mode);
        u->m->batches_tracked++;
        u->m->folded_valid = 0;
    }
    return ckca__device_status(u->ctx);
}

/* The ops of one SGD step on n labelled pictures, from bytes to new weights. Which pictures, epoch and learning rate is
   in the device memory of u->buffers, so the same sequence of ops serves every step (see ckca__device_record). */
static void ckca__step_ops(ckca__update *u, int n) {
    ckca_context *ctx = u->ctx;
    ckca_model *m = u->m;
    const ckca_update_desc *d = &u->d;
    const int pictures = ckca__step_pictures(u, n);
    const size_t k = (size_t)m->classes;
    float *input = ckca__input_buffer(m, pictures, u->mode), *dlogits;
    ckca_sgd_desc sgd;

    sgd.momentum = d->momentum;
    sgd.weight_decay = d->weight_decay;
    sgd.no_nesterov = d->no_nesterov;
    sgd.clip_norm = d->clip_norm;
    if (n == 0) { /* the other ranks have all pictures of this batch */
        ckca__device_zero(ctx, m->gradients, m->trained * sizeof(float));
        ckca__sum_gradients(m, 0);
        if (ckca__memory_penalizes(u)) ckca__ewc_term(u, n);
        ckca__run_sgd(m, &sgd, u->buffers.lr, u->buffers.gscale);
        m->batches_tracked++;
        return;
    }
    if (u->own_features) {
        m->n = n;
        m->mode = u->mode;
        m->input = input;
        ckca__op_gather(ctx, n, m->features, u->own_features, u->buffers.position, ckca__value(m, m->pooled));
        ckca__layer_of(m, m->logits)->forward(m, m->logits);
        m->batches_tracked++;
    } else {
        ckca__make_batch(m, u->data, n, &d->augment, d->seed, &u->buffers, input);
        if (u->unlabelled)
            ckca__make_batch(m, u->unlabelled, n, &d->augment, d->seed, &u->unlabelled_buffers,
                             input + (size_t)n * (size_t)m->height * (size_t)m->width * (size_t)m->channels);
        ckca__run_forward(m, pictures, u->mode, input);
    }

    ckca__clear_has_grad(m);
    dlogits = ckca__grad(m, m->logits);
    if (u->separate)
        ckca__new_term(u, n, ckca__value(m, m->logits), dlogits);
    else
        ckca__op_cross_entropy(ctx, n, m->classes, ckca__value(m, m->logits), u->buffers.labels, d->label_smoothing,
                               u->factors.ce, dlogits, u->buffers.loss, u->buffers.hit);
    m->node[m->logits].has_grad = 1;
    ckca__op_sum(ctx, n, u->buffers.loss, u->buffers.sums);
    ckca__op_count(ctx, n, u->buffers.hit, u->buffers.sums + 3);
    if (u->unlabelled) ckca__device_zero(ctx, dlogits + (size_t)n * k, (size_t)n * k * sizeof(float));
    if (d->w_kd > 0 || ckca__uses_stages(u) || ckca__uses_features(u)) ckca__teacher_outputs(u, pictures, input);
    if (d->w_kd > 0) ckca__distillation_term(u, n);
    if (d->w_feat > 0) ckca__feature_term(u, n);

    ckca__device_zero(ctx, m->gradients, m->trained * sizeof(float));
    m->sums_gradients = ctx->ranks.size > 1;
    m->share = u->share;
    ckca__run_backward(m);
    if (m->sums_gradients) ckca__device_ranks_wait(ctx);
    m->sums_gradients = 0;
    if (ckca__memory_penalizes(u)) ckca__ewc_term(u, n);
    ckca__run_sgd(m, &sgd, u->buffers.lr, u->buffers.gscale);
}

/* Sends the pictures without labels of an SGD step with n others, which are the epoch's from offset on. A pure function
   of epoch and offset, so that a resumed update goes on with the same ones, and ranks share them out. */
static ckca_status ckca__send_unlabelled(ckca__update *u, int offset, int n) {
    const int count = u->unlabelled->count;
    const int64_t first = (int64_t)u->epoch * u->data->count + offset;
    int *position = u->unlabelled_order + count, i;
    for (i = 0; i < n; i++) {
        const int64_t pass = (first + i) / count;
        if (pass != u->unlabelled_pass) /* ~seed: an order of its own, if both sets have as many pictures */
            ckca_shuffle(~u->d.seed, (int)(pass % INT_MAX), count, u->unlabelled_order);
        u->unlabelled_pass = pass;
        position[i] = u->unlabelled_order[(first + i) % count];
    }
    return ckca__send_batch(u->ctx, u->unlabelled, position, n, u->epoch, 0, &u->unlabelled_buffers);
}

/* Sets u->teacher_logits and u->teacher_features for the current batch, whose n pictures (each height x width x channels)
   are at input: from the cache, or by a forward pass. */
static void ckca__teacher_outputs(ckca__update *u, int n, const float *input) {
    ckca_model *t = u->teacher;
    if (u->cache_logits) {
        u->teacher_logits = u->buffers.teacher_logits;
        u->teacher_features = u->buffers.teacher_features;
        if (u->d.w_kd > 0)
            ckca__op_gather(u->ctx, n, t->classes, u->cache_logits, u->buffers.position, u->buffers.teacher_logits);
        if (ckca__uses_features(u))
            ckca__op_gather(u->ctx, n, t->features, u->cache_features, u->buffers.position,
                            u->buffers.teacher_features);
    } else {
        ckca__run_forward(t, n, ckca__uses_stages(u) ? CKCA__MODE_STAGES : CKCA__MODE_EVALUATE, input);
        u->teacher_logits = ckca__value(t, t->logits);
        u->teacher_features = ckca__value(t, t->pooled);
    }
}

/* The factors of the loss's terms, for an update of steps SGD steps. This is the one place where GROWTH is defined: AdaKD
   weighs w = w_kd 0.3 n_old / n_new against a cross-entropy of 1, n_old pictures being behind the teacher and n_new in the
   chunk. A heavy AdaKD makes the gradient longer at the same learning rate, and an update of few steps has no time to
   come back from where that throws it; so the whole loss is divided where 1 + w exceeds steps / 80 (1 to 4 at most). */
static ckca__factors ckca__growth(const ckca_update_desc *d, double n_old, double n_new, double steps) {
    const int grows = ckca__adakds[d->adakd].grows && d->w_kd > 0;
    const double w = grows ? d->w_kd * 0.3 * n_old / n_new : d->w_kd, room = steps / 80;
    const double most = !grows ? 1 + w : room < 1 ? 1 : room > 4 ? 4 : room, scale = 1 + w > most ? most / (1 + w) : 1;
    ckca__factors factors;
    factors.ce = (float)scale;
    factors.kd = (float)(scale * w);
    factors.feat = (float)(scale * d->w_feat);
    return factors;
}

/* The same for the update that is planned. */
static void ckca__set_factors(ckca__update *u) {
    const double pictures = (double)u->chunk->count + ckca__memory_count(u->d.memory);
    u->factors = ckca__growth(&u->d, u->d.teacher_pictures, u->chunk->count, u->d.epochs * ceil(pictures / u->d.batch));
}

/* AdaKD: adds to the gradient of the logits and to the term's sum over the batch; n: the labelled pictures. */
static void ckca__distillation_term(ckca__update *u, int n) {
    const float *class_weight = ckca__adakds[u->d.adakd].by_class ? u->buffers.class_weight : NULL;
    ckca__distil(u, 0, n, u->buffers.labels, class_weight);
    if (u->unlabelled) ckca__distil(u, n, n, NULL, NULL);
}

/* The same for n rows of the batch from first on. */
static void ckca__distil(ckca__update *u, int first, int n, const int *labels, const float *class_weight) {
    const ckca_model *m = u->m;
    const size_t at = (size_t)first * (size_t)m->classes;
    const float *student = ckca__value(m, m->logits) + at, *teacher = u->teacher_logits + at;
    float *dlogits = ckca__grad(m, m->logits) + at;
    if (u->known < m->classes)
        ckca__known_term(u, n, student, teacher, labels, class_weight, dlogits);
    else
        ckca__op_adakd(u->ctx, n, m->classes, student, teacher, labels, class_weight, u->d.temperature, u->factors.kd,
                       dlogits, u->buffers.loss);
    ckca__op_sum(u->ctx, n, u->buffers.loss, u->buffers.sums + 1);
}

/* AdaKD over the first known classes: gathers their columns of both networks' logits and puts the gradient back. */
static void ckca__known_term(ckca__update *u, int n, const float *student, const float *teacher, const int *labels,
                             const float *class_weight, float *dlogits) {
    const int k = u->m->classes, known = u->known;
    ckca__op_gather(u->ctx, n * known, 1, student, u->known_from, u->known_student);
    ckca__op_gather(u->ctx, n * known, 1, teacher, u->known_from, u->known_teacher);
    ckca__device_zero(u->ctx, u->known_gradient, ((size_t)u->d.batch * (size_t)known + 1) * sizeof(float));
    ckca__op_adakd(u->ctx, n, known, u->known_student, u->known_teacher, labels, class_weight, u->d.temperature,
                   u->factors.kd, u->known_gradient, u->buffers.loss);
    ckca__op_gather(u->ctx, n * k, 1, u->known_gradient, u->known_to, u->known_wide);
    ckca__op_add_backward(u->ctx, 0, (size_t)n * (size_t)k, NULL, u->known_wide, dlogits, 1);
}

/* Cross-entropy over the classes that are not known to the teacher. If all pictures are of those, the softmax over all
   classes would only learn never to answer with an old one; each half has a softmax of its own instead, as in Learning
   without Forgetting (Li and Hoiem 2016). The labels count from the first of these classes (ckca__batch_buffers). */
static void ckca__new_term(ckca__update *u, int n, const float *logits, float *dlogits) {
    const int k = u->m->classes, fresh = k - u->known;
    ckca__op_gather(u->ctx, n * fresh, 1, logits, u->new_from, u->new_logits);
    ckca__device_zero(u->ctx, u->new_gradient, ((size_t)u->d.batch * (size_t)fresh + 1) * sizeof(float));
    ckca__op_cross_entropy(u->ctx, n, fresh, u->new_logits, u->buffers.labels, u->d.label_smoothing,
                           u->factors.ce, u->new_gradient, u->buffers.loss, u->buffers.hit);
    ckca__op_gather(u->ctx, n * k, 1, u->new_gradient, u->new_to, dlogits);
}

/* Allocates what ckca__known_term and ckca__new_term need. Only the form's weights can name a label beyond the known
   classes: CLASS, which looks it up in a table of all, where the new ones have 1. */
static ckca_status ckca__prepare_known(ckca__update *u) {
    const size_t k = (size_t)u->m->classes, known = (size_t)u->known, batch = (size_t)u->d.batch;
    const size_t narrow = ckca__round_up(ckca__mul(batch, known) + 1, CKCA__ALIGN / sizeof(float));
    const size_t rest = ckca__round_up(ckca__mul(batch, k - known) + 1, CKCA__ALIGN / sizeof(float));
    const size_t wide = ckca__round_up(ckca__mul(batch, k), CKCA__ALIGN / sizeof(float));
    int *from, *to, *new_from, *new_to, label;
    size_t i, j;
    if (ckca__mul(batch, k) > INT_MAX / 2)
        return ckca__fail(u->ctx, CKCA_EINVAL, "update: a batch of %d with %d classes is too large", u->d.batch,
                          u->m->classes);
    u->separate = 1;
    for (i = 0; i < (size_t)u->data->count; i++) {
        label = u->data->store->labels[u->data->index[i]];
        if (label < u->known) u->separate = 0;
    }
    if (u->separate) u->buffers.first_label = u->known;
    u->known_bytes = (4 * narrow + 3 * rest + 3 * wide) * sizeof(float);
    u->known_block = ckca__device_alloc(u->ctx, u->known_bytes);
    from = (int *)ckca__alloc(u->ctx, (narrow + rest + 2 * wide) * sizeof(int));
    if (!u->known_block || !from) {
        ckca__release(u->ctx, from);
        return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for the logits of %d classes", u->m->classes);
    }
    u->known_from = (int *)u->known_block;
    u->known_to = u->known_from + narrow;
    u->new_from = u->known_to + wide;
    u->new_to = u->new_from + rest;
    u->new_logits = (float *)(void *)(u->new_to + wide);
    u->new_gradient = u->new_logits + rest;
    u->known_student = u->new_gradient + rest;
    u->known_teacher = u->known_student + narrow;
    u->known_gradient = u->known_teacher + narrow;
    u->known_wide = u->known_gradient + narrow;
    to = from + narrow;
    new_from = to + wide;
    new_to = new_from + rest;
    for (i = 0; i < batch; i++) {
        for (j = 0; j < known; j++) from[i * known + j] = (int)(i * k + j);
        for (j = known; j < k; j++) new_from[i * (k - known) + j - known] = (int)(i * k + j);
        for (j = 0; j < k; j++) { /* behind both gradients is a zero */
            to[i * k + j] = (int)(j < known ? i * known + j : batch * known);
            new_to[i * k + j] = (int)(j < known ? batch * (k - known) : i * (k - known) + j - known);
        }
    }
    ckca__device_upload(u->ctx, u->known_block, from, (narrow + rest + 2 * wide) * sizeof(int));
    ckca__release(u->ctx, from);
    return ckca__device_status(u->ctx);
}

/* FeatReg between node i's outputs for the n labelled pictures and teacher (as many values): their gradient, and the
   term's sum over the batch. Pictures without labels have no such term. */
static void ckca__compare_features(ckca__update *u, int n, int i, const float *teacher, int bf16_teacher, float scale) {
    ckca_model *m = u->m;
    const ckca__node *x = &m->node[i];
    const int d = x->h * x->w * x->c, accumulate = ckca__accumulates(m, i);
    const size_t bytes = (size_t)n * (size_t)d * (x->bf16 ? 2 : sizeof(float));
    ckca__op_featreg(u->ctx, x->bf16, bf16_teacher, n, d, ckca__value(m, i), teacher, scale, ckca__grad(m, i),
                     accumulate, ckca__uses_centroids(u) ? 0.0f : 1.0f, u->buffers.loss);
    ckca__op_sum(u->ctx, n, u->buffers.loss, u->buffers.sums + 2);
    if (u->unlabelled && !accumulate) ckca__device_zero(u->ctx, (char *)ckca__grad(m, i) + bytes, bytes);
}

/* FeatReg of the features, or of every stage's map. */
static void ckca__feature_term(ckca__update *u, int n) {
    ckca_model *m = u->m, *t = u->teacher;
    int i, j = 0, stages = 0;
    if (ckca__uses_centroids(u) && !u->separate) { /* classes that are new to all pictures have no means yet */
        ckca__op_gather(u->ctx, n, m->features, u->centroids, u->buffers.labels, u->buffers.teacher_features);
        ckca__compare_features(u, n, m->pooled, u->buffers.teacher_features, 0, u->factors.feat);
    }
    if (ckca__uses_features(u)) ckca__compare_features(u, n, m->pooled, u->teacher_features, 0, u->factors.feat);
    if (!ckca__uses_stages(u)) return;
    for (i = 0; i < m->nodes; i++) stages += m->node[i].stage;
    for (i = 0; i < m->nodes; i++) {
        if (!m->node[i].stage) continue;
        while (!t->node[j].stage) j++;
        ckca__compare_features(u, n, i, ckca__value(t, j), t->node[j].bf16, u->factors.feat / (float)stages);
        j++;
    }
}

/* EWC: the penalty's gradient; n times its value goes to the sum of cross-entropies, which makes it part of the loss. */
static void ckca__ewc_term(ckca__update *u, int n) {
    ckca_model *m = u->m;
    ckca__op_ewc(u->ctx, m->trainable, m->values, u->old->values, ckca__memory_fisher(u->d.memory), u->d.ewc_lambda,
                 m->gradients, n, u->buffers.sums, m->workspace);
}

/* The learning rate of SGD step s, from 0: linear warm-up to the peak, then the schedule. */
static float ckca__learning_rate(const ckca_update_desc *d, int64_t s, int batches) {
    const double warm = floor((double)d->warmup_epochs * batches), total = (double)d->epochs * batches, at = (double)s;
    double rate = d->lr;
    if (at < warm) return (float)(rate * (at + 1) / warm);
    if (d->schedule == CKCA_SCHEDULE_COSINE)
        rate *= 0.5 * (1 + cos(3.141592653589793 * (at - warm) / (total > warm ? total - warm : 1)));
    if (d->schedule == CKCA_SCHEDULE_STEP) rate *= pow(d->step_factor, floor(at / (d->step_epochs * (float)batches)));
    return (float)rate;
}

/* Downloads the sums of the epoch so far and fails if the loss is not finite. A GPU finishes all queued steps first.
   Several processes: called after every step, with its status; the device's sums are those of this step and rank, *save
   becomes rank 0's. */
static ckca_status ckca__fetch_sums(ckca__update *u, ckca_status status, int *save) {
    ckca_context *ctx = u->ctx;
    double sums[5];
    ckca__device_download(ctx, sums, u->buffers.sums, 4 * sizeof *sums);
    if (!status) status = ckca__device_status(ctx);
    if (ctx->ranks.size > 1) {
        int i;
        sums[4] = *save && ctx->ranks.rank == 0;
        ckca__device_zero(ctx, u->buffers.sums, 4 * sizeof *u->buffers.sums);
        if ((status = ckca__ranks_agree_on(ctx, "ckca_update", status, sums))) return status;
        *save = sums[4] > 0;
        for (i = 0; i < 3; i++) u->sums[i] += sums[i];
        u->correct += (int)sums[3];
        ctx->agreed = 1; /* all ranks have the same sums */
        status = ckca__check_loss(u);
        if (!status) ctx->agreed = 0;
        return status;
    }
    if (status) return status;
    memcpy(u->sums, sums, sizeof u->sums);
    u->correct = (int)sums[3];
    return ckca__check_loss(u);
}

static ckca_status ckca__check_loss(const ckca__update *u) {
    const int64_t step = (int64_t)u->epoch * u->batches + u->batch;
    if (!isfinite(u->sums[0]) || !isfinite(u->sums[1]) || !isfinite(u->sums[2]))
        return ckca__fail(u->ctx, CKCA_ENAN,
                          "the loss is no longer finite: update %d, epoch %d, batch %d of %d, learning rate %g",
                          u->m->updates + 1, u->epoch + 1, u->batch + 1, u->batches,
                          (double)ckca__learning_rate(&u->d, step, u->batches));
    return CKCA_OK;
}

/* Fails if a value of p is not finite. values: p->count floats on the host. The message begins with what and has prefix
   before the parameter's name. */
static ckca_status ckca__check_finite(ckca_context *ctx, const char *what, const char *prefix, const ckca__parameter *p,
                                      const float *values) {
    size_t i;
    for (i = 0; i < p->count && isfinite(values[i]); i++) continue;
    if (i == p->count) {
        for (i = 0; p->role == CKCA__ROLE_VAR && i < p->count; i++)
            if (values[i] < 0)
                return ckca__fail(ctx, CKCA_EFORMAT, "%s: %s%s has the negative variance %g", what, prefix, p->name,
                                  (double)values[i]);
        return CKCA_OK;
    }
    return ckca__fail(ctx, CKCA_ENAN, "%s: %s%s is not finite: value %.0f of %.0f is %s", what, prefix, p->name,
                      (double)i + 1, (double)p->count, isnan(values[i]) ? "NaN" : "infinite");
}

/* 1 if parameter p is trained, and so has a gradient and momentum. */
static int ckca__has_momentum(const ckca_model *m, const ckca__parameter *p) {
    return p->role < CKCA__ROLE_MEAN && m->node[p->node].rate > 0;
}

/* The same for all weights and running statistics of a model and, if momentum is 1, its momentum. */
static ckca_status ckca__check_all_finite(const ckca_model *m, const char *what, int momentum) {
    const size_t size = m->all > m->trainable ? m->all : m->trainable;
    float *host = (float *)ckca__alloc(m->ctx, size * sizeof(float));
    ckca_status status = CKCA_OK;
    int i, slot;
    if (!host)
        return ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for %.1f MB of weights", what, (double)size * 4e-6);
    for (slot = 0; !status && slot <= momentum; slot++) {
        ckca__device_download(m->ctx, host, slot ? m->momentum : m->values,
                              (slot ? m->trained : m->all) * sizeof(float));
        status = ckca__device_status(m->ctx);
        for (i = 0; !status && i < m->parameters; i++)
            if (!slot || ckca__has_momentum(m, &m->parameter[i]))
                status = ckca__check_finite(m->ctx, what, slot ? "momentum." : "", &m->parameter[i],
                                            host + (slot ? m->parameter[i].slot : m->parameter[i].offset));
    }
    ckca__release(m->ctx, host);
    return status;
}

/* ---- before the first SGD step: settings, teacher, memory, starting weights, the fingerprint ---- */

/* Prepares everything that ckca__train needs; resumes from the training state if there is one. */
static ckca_status ckca__begin(ckca__update *u, const ckca_update_desc *desc) {
    ckca_model *m = u->m;
    const ckca_model *teacher = u->old;
    ckca_status status;
    int found = 0;
    if (desc) u->d = *desc;
    if ((status = ckca__check_trained(m, "ckca_update"))) return status;
    if ((status = ckca_update_defaults(m, u->data, &u->d))) return status;
    ckca__settings_resolve_off(&u->d);
    if (u->d.seconds > 0 && u->ctx->ranks.size > 1)
        return ckca__fail(u->ctx, CKCA_EINVAL, "update: seconds is planned for one process, there are %d ranks",
                          u->ctx->ranks.size);
    if (u->d.patience > 0 && u->ctx->ranks.size > 1)
        return ckca__fail(u->ctx, CKCA_EINVAL, "update: patience needs one process, there are %d ranks",
                          u->ctx->ranks.size);
    if ((status = ckca__hold_out(u))) return status;
    ckca__set_factors(u);
    if (u->d.w_kd > 0) u->unlabelled = u->d.unlabelled;
    u->asked = u->d;
    if (u->ctx->ranks.rank) u->d.state = NULL; /* rank 0 alone touches files */
    if (u->d.state && (status = ckca__state_open(u))) return status;
    if (u->d.teacher && u->d.teacher != m) teacher = u->d.teacher;
    if (!(u->d.w_kd > 0) && !(u->d.w_feat > 0)) teacher = NULL;
    if (teacher && !m->normalized && teacher->normalized && teacher->channels == m->channels) {
        memcpy(m->normalization, teacher->normalization, (size_t)m->channels * 2 * sizeof(float));
        m->normalized = 1;
    }
    if ((status = ckca__bind_data(m, u->data, "update"))) return status;
    if (u->d.holdout_data && (status = ckca__bind_data(m, u->d.holdout_data, "update: holdout_data"))) return status;
    if (u->pick && ((status = ckca_model_copy(&u->candidate, m)) || (status = ckca_model_copy(&u->best, m))))
        return status;
    if (u->d.memory && (status = ckca__memory_join(u))) return status;
    if (teacher && (status = ckca__check_teacher(u, teacher))) return status;
    if (teacher == u->old)
        u->teacher = u->old;
    else if (teacher && (status = ckca_model_copy(&u->teacher, teacher)))
        return status;
    u->mode = CKCA__MODE_TRAIN | (ckca__uses_stages(u) ? CKCA__MODE_STAGES : 0);
    u->states = u->d.state != NULL;
    u->part = ckca__part(u->ctx, u->d.batch, 1);
    u->batches = (u->data->count + u->d.batch - 1) / u->d.batch;
    u->order = (int *)ckca__alloc(u->ctx, (size_t)u->data->count * sizeof(int));
    if (!u->order)
        return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for the order of %d pictures", u->data->count);
    if (u->unlabelled && (status = ckca__prepare_unlabelled(u))) return status;
    if ((status = ckca__batch_buffers_alloc(u->ctx, &u->buffers, ckca__step_pictures(u, u->part), m->classes,
                                            m->features)))
        return status;
    if ((status = ckca__reserve(m, ckca__step_pictures(u, u->part), u->mode))) return status;
    u->known = u->teacher == u->old && m->known ? m->known : m->classes;
    if (u->d.w_kd > 0 && u->known < m->classes && (status = ckca__prepare_known(u))) return status;
    if (u->d.memory_mb > 0) {
        m->evaluation_batch = u->old->evaluation_batch = u->d.batch;
        if (u->pick) u->candidate->evaluation_batch = u->best->evaluation_batch = u->d.batch;
        if (u->teacher) u->teacher->evaluation_batch = u->d.batch;
    }
    if (u->ctx->ranks.size > 1 && (status = ckca__compare_ranks(u))) return status;
    if (u->teacher && (status = ckca__prepare_teacher(u))) return status;
    if (ckca__needs_feed(u->data->store, &u->d.augment) &&
        !(u->ahead_order = (int *)ckca__alloc(u->ctx, (size_t)u->data->count * sizeof(int))))
        return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for the order of %d pictures", u->data->count);
    if ((status = ckca__prepare_data(u->ctx, u->data, u->part, &u->d.augment, u->d.seed, ckca__plan_training, u,
                                     &u->buffers)))
        return status;
    if (u->unlabelled)
        status = ckca__prepare_data(u->ctx, u->unlabelled, u->part, &u->d.augment, u->d.seed, NULL, NULL,
                                    &u->unlabelled_buffers);
    if (status) return status;
    if (u->d.state || u->ctx->ranks.size > 1) {
        status = u->d.state ? ckca__fingerprint(u) : CKCA_OK;
        if (!status && u->d.state) status = ckca__state_load(u, &found);
        if (u->ctx->ranks.size > 1) status = ckca__share_state(u, status, &found);
        if (status) return status;
        if (found && u->ctx->ranks.size < 2) {
            double sums[4];
            memcpy(sums, u->sums, sizeof u->sums);
            sums[3] = u->correct;
            ckca__device_upload(u->ctx, u->buffers.sums, sums, sizeof sums);
        }
    }
    m->frozen_valid = 0;
    if ((status = ckca__prepare_frozen(m)) || (status = ckca__cache_features(u)) || found) return status;
    if (u->d.seconds > 0 && (status = ckca__fit_time(u))) return status;
    ckca__device_zero(u->ctx, m->momentum, m->trained * sizeof(float));
    return ckca__starting_weights(u);
}

/* If only the head is trained and nothing is augmented, the features of a picture are the same in every epoch. */
static ckca_status ckca__cache_features(ckca__update *u) {
    ckca_model *m = u->m;
    const size_t bytes = ckca__mul((size_t)u->data->count, (size_t)m->features * sizeof(float));
    ckca_score score;
    ckca_status status;
    if (!m->node[m->pooled].constant || ckca__augments(&u->d.augment) || bytes > CKCA__CACHE_BYTES || u->unlabelled ||
        (u->teacher && !u->cache_logits))
        return CKCA_OK;
    u->own_features_bytes = bytes;
    u->own_features = (float *)ckca__device_alloc(u->ctx, bytes);
    if (!u->own_features)
        return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for the features of %d pictures",
                          u->data->count);
    if ((status = ckca__evaluate_all(m, m, u->data, &score, NULL, NULL, NULL, u->own_features, NULL))) return status;
    return ckca__reserve(m, u->d.batch, u->mode);
}

/* Divides the pictures: to train on, to test on and, with patience, to choose the epoch with. */
static ckca_status ckca__hold_out(ckca__update *u) {
    const ckca_data *own = u->d.holdout_data, *held = own;
    ckca_status status;
    int half, i;
    if (own && own->store->ctx != u->ctx)
        return ckca__fail(u->ctx, CKCA_EINVAL, "update: holdout_data belongs to another context than the model");
    if (own && own->store == u->data->store) {
        unsigned char *mark = (unsigned char *)ckca__alloc(u->ctx, (size_t)own->store->count);
        if (!mark)
            return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for %d pictures", own->store->count);
        for (i = 0; i < u->data->count; i++) mark[u->data->index[i]] = 1;
        for (i = 0; i < own->count && !mark[own->index[i]];) i++;
        ckca__release(u->ctx, mark);
        if (i < own->count)
            return ckca__fail(u->ctx, CKCA_EINVAL, "update: picture %d of holdout_data is in data too", i);
    }
    if (u->d.holdout > 0) {
        if ((status = ckca_holdout(u->data, u->d.holdout, u->d.seed, &u->view[0], &u->view[1]))) return status;
        u->data = u->chunk = u->view[0];
        held = u->view[1];
    }
    if (u->d.patience && (!held || held->count < 2))
        return ckca__fail(u->ctx, CKCA_EINVAL,
                          "update: patience is %d, but %d pictures are held out: one to choose the epoch and one to test "
                          "it are the least",
                          u->d.patience, held ? held->count : 0);
    u->test = held;
    if (!u->d.patience) return CKCA_OK;
    for (half = 0; half < 2; half++) { /* every other one: they may be sorted by class */
        const int n = (held->count + 1 - half) / 2;
        status = ckca__view(&u->view[2 + half], held->store, held->index, n);
        if (status) return status;
        for (i = 0; i < n; i++) u->view[2 + half]->index[i] = held->index[2 * i + half];
    }
    u->test = u->view[2];
    u->pick = u->view[3];
    return CKCA_OK;
}

CKCA_API ckca_status ckca_update_defaults(const ckca_model *m, const ckca_data *data, ckca_update_desc *desc) {
    ckca_update_desc d;
    ckca_status status;
    int first_update, train = 0, held = 0;
    if (!m) return CKCA_EINVAL;
    if (!data || !desc) return ckca__null(m->ctx, "ckca_update_defaults", !data ? "data" : "desc");
    if ((status = ckca__check_finished(m, "ckca_update_defaults")) ||
        (status = ckca__settings_check(m->ctx, "update", desc)))
        return status;
    d = *desc;
    if ((status = ckca__memory_needed(m, &d))) return status;
    first_update = m->updates == 0 && !d.teacher; /* no earlier knowledge to keep */
    if (d.method == CKCA_METHOD_LWF) d.adakd = CKCA_ADAKD_CONSTANT;
    if (d.w_kd == 0) d.w_kd = ckca__adakds[d.adakd].w_kd;
    if (d.w_feat == 0 && !ckca__fits_featreg(m, d.teacher ? d.teacher : m, d.featreg)) d.w_feat = CKCA_OFF;
    if (d.teacher_pictures == 0 && !first_update) {
        const int64_t known = d.teacher ? d.teacher->pictures : m->pictures;
        const int64_t pictures = known > 0 ? known : data->count;
        d.teacher_pictures = pictures < CKCA__PICTURES_MAX ? (int)pictures : CKCA__PICTURES_MAX;
    }
    if (first_update || (d.method != CKCA_METHOD_CKCA && d.method != CKCA_METHOD_LWF)) d.w_kd = d.w_feat = CKCA_OFF;
    if (d.method == CKCA_METHOD_LWF) d.w_feat = CKCA_OFF;
    if (m->node[m->pooled].constant) d.w_feat = CKCA_OFF; /* frozen features cannot move */
    if (first_update) d.method = CKCA_METHOD_WARM;
    if (d.method != CKCA_METHOD_EWC) d.ewc_lambda = CKCA_OFF;
    if (d.augment.resized_crop && d.augment.crop_min == 0) d.augment.crop_min = 0.25f;
    if (d.holdout > 0 && d.holdout_data)
        return ckca__fail(m->ctx, CKCA_EINVAL, "update: holdout is %g, but holdout_data is set too: choose one",
                          (double)d.holdout);
    train = data->count;
    if (d.holdout >= 0 && !d.holdout_data) {
        const int by_default = d.holdout == 0;
        if (by_default) d.holdout = m->updates == 0 || d.method == CKCA_METHOD_SCRATCH ? CKCA_OFF : 0.2f;
        if (d.holdout > 0) {
            if ((status = ckca__choose_holdout(data, d.holdout, d.seed, NULL, &held, &train))) return status;
            if (by_default && held < (d.patience ? 20 : 10)) {
                d.holdout = CKCA_OFF;
                train = data->count;
            }
        }
    } else
        d.holdout = CKCA_OFF;
    ckca__settings_apply_defaults(&d);
    if (d.batch > (int64_t)train + ckca__memory_count(d.memory)) d.batch = train + ckca__memory_count(d.memory);
    if (d.step_epochs == 0) d.step_epochs = (float)d.epochs / 3.0f;
    if (d.memory_mb > 0 && (status = ckca__fit_memory(m, data, &d))) return status;
    *desc = d;
    return CKCA_OK;
}

/* What an update with these settings allocates beside the model's weights and the pictures, at a batch of n. */
static ckca_status ckca__update_bytes(const ckca_model *m, const ckca_data *data, const ckca_update_desc *d, int n,
                                      size_t *bytes) {
    const ckca_model *t = d->teacher && d->teacher->finished ? d->teacher : m; /* else ckca__check_teacher refuses it */
    const size_t weights = m->all * sizeof(float), count = (size_t)data->count;
    const int stages = d->w_feat > 0 && ckca__featregs[d->featreg].stages, unlabelled = d->unlabelled && d->w_kd > 0;
    const int pictures = unlabelled ? 2 * n : n; /* of an SGD step */
    const size_t wide = (size_t)m->classes + (size_t)m->features;
    const size_t outputs = ckca__mul(count, wide * sizeof(float));
    size_t student, teacher = 0, copies = weights; /* of the weights: the model before the update */
    size_t most = 0;
    int i;
    /* For each picture of a batch: labels, logits, ... in two sets of buffers; for each of the data: order, hits. */
    const size_t buffers = ckca__mul((size_t)pictures * 2, (wide + 16) * sizeof(float)) +
                           (4 * count + (unlabelled ? (size_t)d->unlabelled->count : 0)) * sizeof(int) +
                           (size_t)m->classes * 16;
    ckca_status status;
    status = ckca__mode_bytes(m, pictures, CKCA__MODE_TRAIN | (stages ? CKCA__MODE_STAGES : 0), &student);
    if (status) return status;
    if (d->w_kd > 0 || d->w_feat > 0) {
        size_t evaluation, step;
        if ((status = ckca__mode_bytes(t, pictures, CKCA__MODE_EVALUATE, &evaluation)) ||
            (status = ckca__mode_bytes(t, pictures, stages ? CKCA__MODE_STAGES : CKCA__MODE_EVALUATE, &step)))
            return status;
        teacher = step > evaluation ? step : evaluation;
        if (t != m) copies += t->all * sizeof(float);
        if (!stages && !unlabelled && !ckca__augments(&d->augment) && outputs <= CKCA__CACHE_BYTES)
            teacher = ckca__sum(teacher, outputs);
        if (m->known) teacher = ckca__sum(teacher, ckca__mul((size_t)n * 10 + 10, (size_t)m->classes * sizeof(float)));
    }
    if (d->method == CKCA_METHOD_SHRINK_PERTURB) copies += weights;
    if (d->patience > 0) copies += 2 * weights; /* the best epoch's, and those compared with them */
    if (d->holdout > 0 || d->holdout_data) { /* the old network, or the one of an epoch, is evaluated */
        size_t evaluation;
        if ((status = ckca__mode_bytes(m, n, CKCA__MODE_EVALUATE, &evaluation))) return status;
        copies = ckca__sum(copies, ckca__mul(evaluation, d->patience > 0 ? 3 : 1));
    }
    if (ckca__fits_featreg(m, m, CKCA_FEATREG_CENTROID)) /* means, sums in double, a copy */
        copies += 6 * (size_t)m->classes * (size_t)m->features * sizeof(float);
    if (m->node[m->pooled].constant) /* the features of frozen layers */
        copies = ckca__sum(copies, ckca__mul(count, (size_t)m->features * sizeof(float)));
    for (i = 0; i < m->parameters; i++)
        if (m->parameter[i].count > most) most = m->parameter[i].count;
    copies += 2 * most * sizeof(float) > weights ? 2 * most * sizeof(float) : weights; /* checks, training states */
    *bytes = ckca__sum(ckca__sum(student, teacher), ckca__sum(copies, buffers));
    *bytes = ckca__sum(*bytes, (size_t)m->nodes * (2 * sizeof *m->node) + 65536); /* lists of nodes, rounding up */
    return CKCA_OK;
}

/* Lowers d->batch to the largest that d->memory_mb allows. */
static ckca_status ckca__fit_memory(const ckca_model *m, const ckca_data *data, ckca_update_desc *d) {
    const double limit = (double)d->memory_mb * 1e6;
    int fits = 0, most = d->batch + 1; /* fits is known to fit, most is not */
    size_t bytes = 0;
    ckca_status status;
    if ((status = ckca__update_bytes(m, data, d, 1, &bytes))) return status;
    if ((double)bytes > limit)
        return ckca__fail(m->ctx, CKCA_EINVAL,
                          "update: memory_mb is %g, but a batch of 1 needs %.1f MB beside the "
                          "weights (%.1f MB) and the pictures",
                          (double)d->memory_mb, (double)bytes * 1e-6, (double)m->all * 4e-6);
    for (fits = 1; most - fits > 1;) {
        const int n = fits + (most - fits) / 2;
        if ((status = ckca__update_bytes(m, data, d, n, &bytes))) return status;
        if ((double)bytes <= limit)
            fits = n;
        else
            most = n;
    }
    d->batch = fits;
    return CKCA_OK;
}

/* Times a few SGD steps, undoes them, and plans as many epochs as d.seconds allow. */
static ckca_status ckca__fit_time(ckca__update *u) {
    ckca_model *m = u->m;
    double sums[4], began = ckca__seconds(), now, first = 0, step, epoch, left;
    int steps = 0;
    ckca_status status;
    ckca_shuffle(u->d.seed, 0, u->data->count, u->order);
    do {
        if ((status = ckca__train_step(u, u->order, u->d.batch))) return status;
        ckca__device_download(u->ctx, sums, u->buffers.sums, sizeof sums); /* waits for the step */
        if ((status = ckca__device_status(u->ctx))) return status;
        now = ckca__seconds();
        if (!steps++) first = now; /* the first step wakes the threads and touches new memory */
    } while (now - u->start < (double)u->d.seconds / 2 &&
             (steps < 2 || (steps < 12 && now - first < (double)u->d.seconds * 0.02)));
    step = steps > 1 ? (now - first) / (steps - 1) : now - began;
    epoch = step * u->batches;
    left = ((double)u->d.seconds - (now - u->start)) * 0.9;
    if (left < epoch)
        return ckca__fail(
            u->ctx, CKCA_EINVAL,
            "update: seconds is %g, of which %.3g are used: the epoch of %d pictures takes %.3g; there is "
            "time for one of %.0f pictures",
            (double)u->d.seconds, now - u->start, u->data->count, epoch,
            left > 0 ? floor(left / epoch * u->data->count) : 0.0);
    ckca__device_copy(u->ctx, m->values, u->old->values, m->all * sizeof(float));
    m->batches_tracked = u->old->batches_tracked;
    m->folded_valid = 0;
    ckca__shorten(u, left / epoch < u->d.epochs ? (int)(left / epoch) : u->d.epochs);
    return CKCA_OK;
}

/* Shortens the update to so many epochs, its schedule in proportion. */
static void ckca__shorten(ckca__update *u, int epochs) {
    const float part = (float)epochs / (float)u->d.epochs;
    if (epochs == u->d.epochs) return;
    u->d.warmup_epochs *= part;
    u->d.step_epochs *= part;
    u->d.epochs = epochs;
    ckca__set_factors(u);
}

/* Checks that teacher t fits the student: input, classes, normalisation, and what FeatReg compares. */
static ckca_status ckca__check_teacher(const ckca__update *u, const ckca_model *t) {
    const ckca_model *m = u->m;
    int i;
    if (t->ctx != m->ctx)
        return ckca__fail(u->ctx, CKCA_EINVAL, "teacher: it belongs to another context than the model");
    if (!t->finished) return ckca__fail(u->ctx, CKCA_EINVAL, "teacher: it is not finished (ckca_model_finish)");
    if (t->classes != m->classes || t->height != m->height || t->width != m->width || t->channels != m->channels)
        return ckca__fail(u->ctx, CKCA_ESHAPE,
                          "teacher: its input is %d x %d x %d and it has %d classes, the model's input is %d x %d x %d "
                          "and it has %d classes",
                          t->height, t->width, t->channels, t->classes, m->height, m->width, m->channels, m->classes);
    for (i = 0; t->normalized && i < 2 * m->channels; i++)
        if (fabsf(t->normalization[i] - m->normalization[i]) > 1e-5f)
            return ckca__fail(u->ctx, CKCA_EINVAL, "teacher: its %s of channel %d is %g, the model's is %g",
                              i < m->channels ? "mean" : "std", i % m->channels, (double)t->normalization[i],
                              (double)m->normalization[i]);
    if (!(u->d.w_feat > 0)) return CKCA_OK;
    if (ckca__featregs[u->d.featreg].same_features && t->features != m->features)
        return ckca__fail(u->ctx, CKCA_ESHAPE, "teacher: it has %d features, the model %d: FeatReg's %s needs as many",
                          t->features, m->features, ckca__featregs[u->d.featreg].name);
    if (ckca__featregs[u->d.featreg].centroids && !ckca__fits_featreg(m, t, u->d.featreg))
        return ckca__fail(u->ctx, CKCA_ESHAPE,
                          "update: FeatReg's CENTROID has %d classes x %d features, at most %d values are supported",
                          m->classes, m->features, CKCA_CENTROIDS_MAX);
    if (ckca__featregs[u->d.featreg].stages && !ckca__same_stages(m, t))
        return ckca__fail(u->ctx, CKCA_ESHAPE,
                          "teacher: FeatReg's %s needs stages of the same shapes (ckca_layer_stage) in both networks",
                          ckca__featregs[u->d.featreg].name);
    return CKCA_OK;
}

/* 1 if both networks have the same number of stages, at least one, with maps of the same shapes. */
static int ckca__same_stages(const ckca_model *m, const ckca_model *t) {
    int i = 0, j = 0, same = 0;
    for (;; i++, j++, same++) {
        while (i < m->nodes && !m->node[i].stage) i++;
        while (j < t->nodes && !t->node[j].stage) j++;
        if (i == m->nodes || j == t->nodes) return i == m->nodes && j == t->nodes && same > 0;
        if (m->node[i].h != t->node[j].h || m->node[i].w != t->node[j].w || m->node[i].c != t->node[j].c) return 0;
    }
}

/* 1 if networks of these shapes can be compared in this form of FeatReg. */
static int ckca__fits_featreg(const ckca_model *m, const ckca_model *t, ckca_featreg form) {
    if (ckca__featregs[form].stages) return ckca__same_stages(m, t);
    if (!ckca__featregs[form].centroids) return 1;
    return t->features == m->features && (int64_t)m->classes * m->features <= CKCA_CENTROIDS_MAX;
}

/* Checks the pictures without labels and prepares their batches. */
static ckca_status ckca__prepare_unlabelled(ckca__update *u) {
    const ckca__store *store = u->unlabelled->store, *labelled = u->data->store;
    if (store->ctx != u->ctx)
        return ckca__fail(u->ctx, CKCA_EINVAL, "unlabelled: the pictures belong to another context than the model");
    if (store->height != labelled->height || store->width != labelled->width || store->channels != labelled->channels)
        return ckca__fail(u->ctx, CKCA_ESHAPE,
                          "unlabelled: the pictures are %d x %d x %d, the labelled ones %d x %d x %d", store->height,
                          store->width, store->channels, labelled->height, labelled->width, labelled->channels);
    if (u->d.batch > CKCA__BATCH_MAX / 2)
        return ckca__fail(u->ctx, CKCA_EINVAL, "update: batch is %d, with unlabelled pictures it must be 1 to %d",
                          u->d.batch, CKCA__BATCH_MAX / 2);
    u->unlabelled_order = (int *)ckca__alloc(u->ctx, ((size_t)u->unlabelled->count + (size_t)u->d.batch) * sizeof(int));
    if (!u->unlabelled_order)
        return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for the order of %d unlabelled pictures",
                          u->unlabelled->count);
    return ckca__batch_buffers_alloc(u->ctx, &u->unlabelled_buffers, u->d.batch, 1, 1);
}
/* 1 if pictures differ from epoch to epoch. */
static int ckca__augments(const ckca_augment *a) { return a->pad || a->flip || a->resized_crop || a->jitter > 0; }

/* Evaluates the teacher on the new pictures: its accuracy per class (for AdaKD's CLASS) and, unless pictures are
   augmented, stages are compared or some have no labels, the cache of its outputs. For CENTROID, a teacher without class
   means is given those of the new pictures. */
static ckca_status ckca__prepare_teacher(ckca__update *u) {
    ckca_context *ctx = u->ctx;
    ckca_model *t = u->teacher;
    const size_t count = (size_t)u->data->count;
    const int per_batch = ckca__uses_stages(u) || u->unlabelled || ckca__augments(&u->d.augment);
    const int measure = ckca__uses_centroids(u) && !t->centroids.count;
    float *by_class = (float *)ckca__alloc(ctx, (size_t)t->classes * sizeof(float));
    double *sums = NULL;
    ckca_score score;
    ckca_status status;
    int i;
    if (!by_class) return ckca__fail(ctx, CKCA_ENOMEM, "update: out of memory for %d classes", t->classes);
    u->cache_logits_bytes = ckca__mul(count, (size_t)t->classes * sizeof(float));
    u->cache_features_bytes = ckca__uses_features(u) ? ckca__mul(count, (size_t)t->features * sizeof(float)) : 0;
    if (measure) {
        sums = (double *)ckca__alloc(ctx, (size_t)t->classes * (size_t)t->features * sizeof *sums);
        if (!sums) {
            ckca__release(ctx, by_class);
            return ckca__fail(ctx, CKCA_ENOMEM, "update: out of memory for the means of %d classes", t->classes);
        }
    }
    if (!per_batch && ckca__sum(u->cache_logits_bytes, u->cache_features_bytes) <= CKCA__CACHE_BYTES) {
        u->cache_logits = (float *)ckca__device_alloc(ctx, u->cache_logits_bytes);
        if (ckca__uses_features(u)) u->cache_features = (float *)ckca__device_alloc(ctx, u->cache_features_bytes);
        if (!u->cache_logits || (ckca__uses_features(u) && !u->cache_features)) {
            ckca__release(ctx, sums);
            ckca__release(ctx, by_class);
            return ckca__fail(ctx, CKCA_ENOMEM, "update: out of memory for the teacher's outputs on %d pictures",
                              u->data->count);
        }
    }
    status = ckca__evaluate_all(t, u->m, u->data, &score, by_class, NULL, u->cache_logits, u->cache_features, sums);
    if (!status && ckca__uses_centroids(u)) status = ckca__prepare_centroids(u, sums);
    if (!status) {
        u->teacher_accuracy = score.top1;
        for (i = 0; i < t->classes; i++)
            if (i >= u->known || u->separate)
                by_class[i] = 1; /* the teacher does not know it, but may know what it looks like */
            else if (by_class[i] < 0)
                by_class[i] = 0; /* a class without pictures; never read */
        ckca__device_upload(ctx, u->buffers.class_weight, by_class, (size_t)t->classes * sizeof(float));
        status = ckca__reserve(t, ckca__step_pictures(u, u->part),
                               ckca__uses_stages(u) ? CKCA__MODE_STAGES : CKCA__MODE_EVALUATE);
    }
    ckca__release(ctx, sums);
    ckca__release(ctx, by_class);
    return status;
}

/* Sends CENTROID's class means to the device: the teacher's or, if sums (see ckca__evaluate_all) is not NULL, those of
   the new pictures. */
static ckca_status ckca__prepare_centroids(ckca__update *u, const double *sums) {
    const ckca_model *t = u->teacher;
    ckca__centroids own = {NULL, NULL};
    ckca_status status = CKCA_OK;
    if (sums && (status = ckca__average_features(t, NULL, sums, u->data, &own))) return status;
    u->centroid_bytes = (size_t)t->classes * (size_t)t->features * sizeof(float);
    u->centroids = (float *)ckca__device_alloc(u->ctx, u->centroid_bytes);
    if (u->centroids)
        ckca__device_upload(u->ctx, u->centroids, sums ? own.mean : t->centroids.mean, u->centroid_bytes);
    else
        status = ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for the means of %d classes", t->classes);
    if (!status) status = ckca__device_status(u->ctx);
    ckca__release(u->ctx, own.count);
    return status;
}

/* After the last epoch: the class means that the model will have: those before, and the new pictures' features by the
   updated network, weighted by their numbers. Networks with more than CKCA_CENTROIDS_MAX values in them have none. */
static ckca_status ckca__learn_centroids(ckca__update *u) {
    ckca_model *m = u->m;
    const int fresh = u->d.method == CKCA_METHOD_SCRATCH || m->updates == 0; /* what was before is forgotten */
    ckca_score score;
    double *sums;
    ckca_status status;
    if (!ckca__fits_featreg(m, m, CKCA_FEATREG_CENTROID)) return CKCA_OK;
    sums = (double *)ckca__alloc(u->ctx, (size_t)m->classes * (size_t)m->features * sizeof *sums);
    if (!sums) return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for the means of %d classes", m->classes);
    status = ckca__evaluate_all(m, m, u->chunk, &score, NULL, NULL, NULL, NULL, sums);
    if (!status)
        status =
            ckca__average_features(m, fresh || !m->centroids.count ? NULL : &m->centroids, sums, u->chunk, &u->learnt);
    ckca__release(u->ctx, sums);
    return status;
}

/* Allocates *after: the class means of before (NULL: none) and of data, whose features add up to sums per class
   (classes x features of m). */
static ckca_status ckca__average_features(const ckca_model *m, const ckca__centroids *before, const double *sums,
                                          const ckca_data *data, ckca__centroids *after) {
    const size_t d = (size_t)m->features;
    size_t j;
    int i;
    if (!ckca__centroids_alloc(m, after))
        return ckca__fail(m->ctx, CKCA_ENOMEM, "update: out of memory for the means of %d classes", m->classes);
    for (i = 0; i < data->count; i++) after->count[data->store->labels[data->index[i]]]++;
    for (i = 0; i < m->classes; i++) {
        const int64_t was = before ? before->count[i] : 0, now = was + after->count[i];
        for (j = (size_t)i * d; now > 0 && j < (size_t)(i + 1) * d; j++)
            after->mean[j] = (float)(((was ? (double)was * before->mean[j] : 0) + sums[j]) / (double)now);
        after->count[i] = now < CKCA__COUNT_MAX ? now : CKCA__COUNT_MAX;
    }
    return CKCA_OK;
}

/* Gives frozen layers the values back that they had before the update. */
static void ckca__restore_frozen(ckca__update *u) {
    int i;
    for (i = 0; i < u->m->parameters; i++) {
        const ckca__parameter *p = &u->m->parameter[i];
        if (u->m->node[p->node].rate == 0)
            ckca__device_copy(u->ctx, u->m->values + p->offset, u->old->values + p->offset, p->count * sizeof(float));
    }
}

/* Sets the weights that the method starts from: fresh, shrunk and perturbed, or the checkpoint's. */
static ckca_status ckca__starting_weights(ckca__update *u) {
    ckca_model *m = u->m;
    float *fresh;
    ckca_status status;
    if (u->d.method == CKCA_METHOD_SCRATCH) {
        status = ckca__initialize(m, u->d.seed, m->values);
        ckca__restore_frozen(u);
        return status;
    }
    if (u->d.method != CKCA_METHOD_SHRINK_PERTURB) return CKCA_OK;
    fresh = (float *)ckca__device_alloc(u->ctx, m->all * sizeof(float));
    if (!fresh)
        return ckca__fail(u->ctx, CKCA_ENOMEM, "update: out of memory for %.1f MB of fresh weights",
                          (double)m->all * 4e-6);
    if (!(status = ckca__initialize(m, u->d.seed, fresh)))
        ckca__op_shrink_perturb(u->ctx, m->trainable, m->values, fresh, u->d.shrink, u->d.perturb);
    ckca__restore_frozen(u);
    ckca__device_release(u->ctx, fresh, m->all * sizeof(float));
    return status;
}

/* Extends hash by size bytes. */
static uint64_t ckca__hash(uint64_t hash, const void *bytes, size_t size) {
    const unsigned char *p = (const unsigned char *)bytes;
    uint64_t word;
    size_t i;
    for (i = 0; i + 8 <= size; i += 8) {
        memcpy(&word, p + i, 8);
        hash = (hash ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 29;
    }
    for (; i < size; i++) hash = (hash ^ p[i]) * UINT64_C(0x100000001b3);
    return ckca__mix(hash);
}

/* Extends hash by the first count floats of the model's values. */
static ckca_status ckca__hash_weights(const ckca_model *m, size_t count, uint64_t *hash) {
    float *host = (float *)ckca__alloc(m->ctx, count * sizeof(float));
    if (!host) return ckca__fail(m->ctx, CKCA_ENOMEM, "out of memory for %.1f MB of weights", (double)count * 4e-6);
    ckca__device_download(m->ctx, host, m->values, count * sizeof(float));
    *hash = ckca__hash(*hash, host, count * sizeof(float));
    ckca__release(m->ctx, host);
    return CKCA_OK;
}

/* Extends hash by a picture's decoded pixels, or the bytes of its file, or its path, size and time. */
static uint64_t ckca__hash_picture(uint64_t hash, const ckca__store *store, int i) {
    const unsigned char *raw = ckca__raw(store, i);
    const ckca__source *source = store->source ? &store->source[i] : NULL;
    uint64_t about[4];
    if (raw) return ckca__hash(hash, raw, ckca__picture_bytes(store));
    about[0] = (uint64_t)source->size;
    about[1] = source->bytes ? 0 : (uint64_t)source->time;
    about[2] = (uint64_t)source->short_side;
    about[3] = (uint64_t)source->as_stored;
    hash = ckca__hash(hash, about, sizeof about);
    if (source->bytes) return ckca__hash(hash, source->bytes, source->size);
    return ckca__hash(hash, source->path, strlen(source->path));
}

/* Extends hash by all pictures of data, in their order, with their labels and places in the store. */
static uint64_t ckca__hash_data(const ckca_data *data, uint64_t hash) {
    int i;
    for (i = 0; i < data->count; i++) {
        hash = ckca__hash_picture(hash, data->store, data->index[i]);
        hash = ckca__hash(hash, &data->store->labels[data->index[i]], sizeof(int));
        hash = ckca__hash(hash, &data->index[i], sizeof(int)); /* augmentation depends on it */
    }
    return hash;
}

CKCA_API uint64_t ckca_data_fingerprint(const ckca_data *data) {
    uint64_t hash = 1;
    int i;
    for (i = 0; data && i < data->count; i++) {
        hash = ckca__hash_picture(hash, data->store, data->index[i]);
        hash = ckca__hash(hash, &data->store->labels[data->index[i]], sizeof(int));
    }
    return data ? hash : 0;
}

/* Hashes everything that the result depends on; only an update with the same fingerprint may resume a training state. */
static ckca_status ckca__fingerprint(ckca__update *u) {
    const ckca_update_desc *d = &u->d;
    double fields[CKCA__SETTINGS + 2];
    uint64_t hash = ckca__hash_data(u->data, u->d.seed);
    int i, k = 0;
    ckca_status status;
    if (u->unlabelled) hash = ckca__hash_data(u->unlabelled, hash);
    if (u->ctx->ranks.size > 1) hash = ckca__hash(hash, &u->ctx->ranks.size, sizeof(int));
    if (u->pick) hash = ckca__hash_data(u->pick, hash); /* these choose the epoch */
    for (i = 0; i < CKCA__SETTINGS; i++)
        if (ckca__settings[i].affects_result) fields[k++] = ckca__setting_get(d, &ckca__settings[i]);
    fields[k++] = u->m->updates;
    fields[k++] = u->m->known;
    hash = ckca__hash(hash, fields, (size_t)k * sizeof *fields);
    hash = ckca__hash(hash, u->m->normalization, (size_t)u->m->channels * 2 * sizeof(float));
    for (i = 0; i < u->m->nodes; i++)
        if (u->m->node[i].rate < 1 || u->m->node[i].rate > 1) {
            hash = ckca__hash(hash, &i, sizeof i);
            hash = ckca__hash(hash, &u->m->node[i].rate, sizeof u->m->node[i].rate);
        }
    if ((status = ckca__hash_weights(u->old, u->old->all, &hash))) return status;
    if (u->teacher && u->teacher != u->old && (status = ckca__hash_weights(u->teacher, u->teacher->all, &hash)))
        return status;
    if (ckca__uses_centroids(u) && u->teacher && u->teacher->centroids.count)
        hash = ckca__hash(hash, u->teacher->centroids.count, ckca__centroid_bytes(u->teacher));
    if (ckca__memory_penalizes(u) && (status = ckca__memory_hash(u, &hash))) return status;
    u->fingerprint = hash;
    return CKCA_OK;
}

/* Several processes: fails on all if settings, pictures, network or weights are not the same on all. */
static ckca_status ckca__compare_ranks(ckca__update *u) {
    static const char call[] = "ckca_update";
    const ckca_model *t = u->teacher;
    uint64_t seed = u->d.seed, weights = 0, teacher = 0;
    ckca_status status = CKCA_OK;
    int i;
    for (i = 0; !status && i < CKCA__SETTINGS; i++)
        if (ckca__settings[i].affects_result)
            status = ckca__ranks_same_number(u->ctx, call, ckca__settings[i].name,
                                             ckca__setting_get(&u->d, &ckca__settings[i]));
    if (!status) status = ckca__ranks_same(u->ctx, call, "seeds", seed);
    if (!status) status = ckca__ranks_same_number(u->ctx, call, "number of pictures", u->data->count);
    if (!status) status = ckca__ranks_same(u->ctx, call, "pictures or labels", ckca__hash_data(u->data, 0));
    if (!status) status = ckca__ranks_same_number(u->ctx, call, "number of trained values", (double)u->m->trained);
    if (!status) {
        uint64_t rates = 0;
        for (i = 0; i < u->m->nodes; i++)
            rates = ckca__hash(rates, &u->m->node[i].rate, sizeof u->m->node[i].rate);
        status = ckca__ranks_same(u->ctx, call, "frozen layers or factors of the learning rate", rates);
    }
    if (!status)
        status = ckca__ranks_same(u->ctx, call, "mean and std",
                                  ckca__hash(0, u->m->normalization, (size_t)u->m->channels * 2 * sizeof(float)));
    if (!status) status = ckca__hash_weights(u->old, u->old->all, &weights);
    if (!status && t && t != u->old) status = ckca__hash_weights(t, t->all, &teacher);
    if ((status = ckca__ranks_agree(u->ctx, call, status))) return status;
    if (!(status = ckca__ranks_same(u->ctx, call, "weights or running statistics", weights)))
        status = ckca__ranks_same(u->ctx, call, "teachers", teacher);
    return status;
}

/* Several processes: what rank 0 has read from its training state (*found, with that status), on all ranks. */
static ckca_status ckca__share_state(ckca__update *u, ckca_status status, int *found) {
    static const char call[] = "ckca_update";
    ckca_context *ctx = u->ctx;
    ckca_model *m = u->m;
    int64_t progress[8];
    double flags[5] = {0, 0, 0, 0, 0};
    flags[0] = u->d.state != NULL;
    flags[1] = *found;
    if ((status = ckca__ranks_agree_on(ctx, call, status, flags))) return status;
    u->states = flags[0] > 0;
    *found = flags[1] > 0;
    if (!*found) return CKCA_OK;
    progress[0] = u->epoch;
    progress[1] = u->batch;
    progress[2] = u->correct;
    progress[3] = m->batches_tracked;
    memcpy(progress + 4, u->sums, sizeof u->sums);
    if (ctx->ranks.broadcast(progress, sizeof progress, ctx->ranks.user)) {
        ctx->ranks_broken = 1;
        return ckca__fail(ctx, CKCA_ERANKS, "%s: the training state could not be sent", call);
    }
    u->epoch = (int)progress[0];
    u->batch = (int)progress[1];
    u->correct = (int)progress[2];
    m->batches_tracked = progress[3];
    memcpy(u->sums, progress + 4, sizeof u->sums);
    m->folded_valid = 0;
    if ((status = ckca__ranks_copy(ctx, call, m->values, m->all))) return status;
    return ckca__ranks_copy(ctx, call, m->momentum, m->trained);
}

/* ---- batches: their order, their input on the device, pictures as floats, a caller's own ---- */
CKCA_API void ckca_shuffle(uint64_t seed, int epoch, int n, int *order) {
    int i;
    if (!order) return;
    for (i = 0; i < n; i++) order[i] = i;
    for (i = n - 1; i > 0; i--) { /* Fisher-Yates */
        const uint64_t r = ckca__random(seed, CKCA__STREAM_SHUFFLE, ((uint64_t)(unsigned)epoch << 32) + (uint64_t)i);
        const int j = (int)(r % ((uint64_t)i + 1)), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
}

/* Writes the batch in b to input (n x height x width x channels), augmented and normalised as m requires. */
static void ckca__make_batch(const ckca_model *m, const ckca_data *data, int n, const ckca_augment *augment,
                             uint64_t seed, const ckca__batch_buffers *b, float *input) {
    const ckca__store *store = data->store;
    const unsigned char *gathered = CKCA__DEVICE_IS_HOST && b->fed ? b->fed->pixels : b->pixels;
    ckca__op_batch(m->ctx, n, store->height, store->width, store->channels, gathered ? gathered : store->resident,
                   gathered != NULL, b->index, augment, seed, b->epoch, m->normalization,
                   m->normalization + m->channels, input);
}

/* Undoes ckca__bind_data after a failure. */
static void ckca__unbind_data(ckca_model *m, int had_names, int was_normalized) {
    m->normalized = was_normalized;
    if (had_names) return;
    ckca__free_names(m->ctx, m->class_names, m->classes);
    m->class_names = NULL;
}

typedef struct ckca__gather {
    const ckca__store *store;
    const int *index;
    unsigned char *to;
} ckca__gather;

static void ckca__gather_picture(void *job, int i, int thread) {
    const ckca__gather *a = (const ckca__gather *)job;
    const size_t size = ckca__picture_bytes(a->store);
    (void)thread;
    memcpy(a->to + (size_t)i * size, a->store->pixels + (size_t)a->index[i] * size, size);
}

/* Uploads the input of one SGD step or evaluation: learning rate, epoch, positions, labels and, if the store streams,
   pixels of the pictures position[0..n) of data. Needs ckca__prepare_data. With a feed it waits for the pictures, and
   fails if one cannot be read. */
static ckca_status ckca__send_batch(ckca_context *ctx, const ckca_data *data, const int *position, int n, int epoch,
                                    float lr, ckca__batch_buffers *b) {
    int *index = (int *)ckca__host_input(b, b->index), *labels = (int *)ckca__host_input(b, b->labels), i;
    if (b->feed) {
        ckca_status status = ckca__feed_take(b->feed, position, n, epoch, &b->fed);
        if (status) return status;
        position = b->fed->position;
    }
    *(float *)ckca__host_input(b, b->lr) = lr;
    *(int *)ckca__host_input(b, b->epoch) = epoch;
    memcpy(ckca__host_input(b, b->position), position, (size_t)n * sizeof *position);
    for (i = 0; i < n; i++) {
        index[i] = data->index[position[i]];
        labels[i] = data->store->labels[index[i]] - b->first_label;
        if (b->fed && b->fed->cropped[i]) index[i] = ~index[i];
    }
    if (b->staging) {
        const size_t size = ckca__picture_bytes(data->store);
        ckca__gather job;
        job.store = data->store;
        job.index = index;
        job.to = (unsigned char *)ckca__device_staging_buffer(ctx, b->staging);
        if (!job.to) return ckca__device_status(ctx);
        if (b->fed)
            memcpy(job.to, b->fed->pixels, (size_t)n * size);
        else
            ckca__parallel(ctx, n, ckca__gather_picture, &job);
        ckca__device_staging_send(ctx, b->staging, b->pixels, (size_t)n * size);
    }
    ckca__device_upload(ctx, b->block, b->host, b->input_bytes);
    return CKCA_OK;
}

/* Prepares batches of up to n pictures of a store. A store that takes at most half of the free device memory is uploaded
   once and stays there (so call ckca__reserve for the models first); otherwise each batch is streamed. */
static ckca_status ckca__prepare_store(ckca_context *ctx, ckca__store *store, int n, ckca__batch_buffers *b) {
    const size_t bytes = ckca__store_bytes(store);
    if (CKCA__DEVICE_IS_HOST) store->resident = store->pixels;
    if (!store->resident && !store->streams) {
        if (bytes <= ckca__device_free_bytes(ctx) / 2)
            store->resident = (unsigned char *)ckca__device_alloc(ctx, bytes);
        if (store->resident) ckca__device_upload(ctx, store->resident, store->pixels, bytes);
        store->streams = !store->resident;
    }
    return store->streams ? ckca__prepare_upload(ctx, store, n, b) : CKCA_OK;
}

/* Prepares batches of up to n pictures of data. Pictures that are not held decoded, or whose full size augment needs,
   are read ahead as planned (see STREAM). */
static ckca_status ckca__prepare_data(ckca_context *ctx, const ckca_data *data, int n, const ckca_augment *augment,
                                      uint64_t seed, int (*plan)(void *user, int *position, int *epoch), void *user,
                                      ckca__batch_buffers *b) {
    ckca_status status;
    if (!ckca__needs_feed(data->store, augment)) return ckca__prepare_store(ctx, data->store, n, b);
    status = ckca__feed_open(ctx, &b->feed, data, n, augment, seed, plan, user);
    if (!status && !CKCA__DEVICE_IS_HOST) status = ckca__prepare_upload(ctx, data->store, n, b);
    return status;
}

/* Buffers to upload each batch of up to n pictures. */
static ckca_status ckca__prepare_upload(ckca_context *ctx, const ckca__store *store, int n, ckca__batch_buffers *b) {
    b->pixel_bytes = ckca__picture_bytes(store) * (size_t)n;
    b->pixels = (unsigned char *)ckca__device_alloc(ctx, b->pixel_bytes);
    b->staging = ckca__device_staging_open(ctx, b->pixel_bytes);
    if (b->pixels && b->staging) return CKCA_OK;
    return ckca__fail(ctx, CKCA_ENOMEM, "out of memory for three buffers of %d pictures, %.1f MB each", n,
                      (double)b->pixel_bytes * 1e-6);
}

/* The host's copy of an input field of b, which is at device. */
static void *ckca__host_input(const ckca__batch_buffers *b, const void *device) {
    return (char *)b->host + ((const char *)device - (const char *)b->block);
}

/* Allocates buffers for up to n pictures; *b needs no initialisation. */
static ckca_status ckca__batch_buffers_alloc(ckca_context *ctx, ckca__batch_buffers *b, int n, int classes,
                                             int features) {
    const size_t row = ckca__round_up((size_t)n * sizeof(float), CKCA__ALIGN);
    const size_t logits = ckca__round_up(ckca__mul(ckca__mul((size_t)n, (size_t)classes), sizeof(float)), CKCA__ALIGN);
    const size_t rest = ckca__round_up(ckca__mul(ckca__mul((size_t)n, (size_t)features), sizeof(float)), CKCA__ALIGN);
    const size_t weights = ckca__round_up((size_t)classes * sizeof(float), CKCA__ALIGN);
    char *at;
    memset(b, 0, sizeof *b);
    b->input_bytes = CKCA__ALIGN + 3 * row;
    b->bytes = ckca__sum(ckca__sum(logits, rest), row * 5 + weights + 3 * CKCA__ALIGN);
    b->block = ckca__device_alloc(ctx, b->bytes);
    b->host = ckca__alloc(ctx, b->input_bytes);
    if (!b->block || !b->host) {
        ckca__batch_buffers_free(ctx, b);
        return ckca__fail(ctx, CKCA_ENOMEM, "out of memory for the labels and logits of a batch of %d", n);
    }
    ckca__device_zero(ctx, b->block, b->bytes); /* ops add to sums */
    at = (char *)b->block;
    b->lr = (float *)(void *)at;
    b->epoch = (int *)(void *)(at + sizeof(float));
    b->index = (int *)(void *)(at += CKCA__ALIGN);
    b->position = (int *)(void *)(at += row);
    b->labels = (int *)(void *)(at += row);
    b->sums = (double *)(void *)(at += row);
    b->gscale = (float *)(void *)(at += CKCA__ALIGN);
    b->hit = (int *)(void *)(at += CKCA__ALIGN);
    b->loss = (float *)(void *)(at += row);
    b->class_weight = (float *)(void *)(at += row);
    b->teacher_logits = (float *)(void *)(at += weights);
    b->teacher_features = (float *)(void *)(at += logits);
    return CKCA_OK;
}

static void ckca__batch_buffers_free(ckca_context *ctx, ckca__batch_buffers *b) {
    ckca__device_release(ctx, b->block, b->bytes);
    ckca__device_release(ctx, b->pixels, b->pixel_bytes);
    if (b->staging) ckca__device_staging_close(ctx, b->staging);
    ckca__feed_free(b->feed);
    ckca__release(ctx, b->host);
    memset(b, 0, sizeof *b);
}

CKCA_API ckca_status ckca_get_batch(ckca_model *m, const ckca_data *data, const int *index, int n,
                                    const ckca_augment *augment, uint64_t seed, int epoch, float *pictures,
                                    int *labels) {
    const size_t values = m ? (size_t)m->height * (size_t)m->width * (size_t)m->channels : 0;
    ckca_update_desc settings;
    ckca__bound bound = {"n", 0, 1, CKCA__BATCH_MAX, 0};
    float *device = NULL;
    int i, had_names, was_normalized;
    ckca__batch_buffers b;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!data || !index || !pictures)
        return ckca__null(m->ctx, "ckca_get_batch", !data ? "data" : !index ? "index" : "pictures");
    memset(&settings, 0, sizeof settings);
    if (augment) settings.augment = *augment;
    bound.value = n;
    if ((status = ckca__check_finished(m, "ckca_get_batch")) ||
        (status = ckca__check_bounds(m->ctx, "ckca_get_batch", &bound, 1)) ||
        (status = ckca__settings_check(m->ctx, "ckca_get_batch", &settings)))
        return status;
    for (i = 0; i < n; i++)
        if (index[i] < 0 || index[i] >= data->count)
            return ckca__fail(m->ctx, CKCA_EINVAL, "ckca_get_batch: index[%d] is %d, there are %d pictures", i,
                              index[i], data->count);
    had_names = m->class_names != NULL;
    was_normalized = m->normalized;
    if ((status = ckca__bind_data(m, data, "batch"))) return status;
    status = ckca__batch_buffers_alloc(m->ctx, &b, n, 1, 1);
    if (!status) status = ckca__prepare_data(m->ctx, data, n, augment, seed, NULL, NULL, &b);
    if (!status) {
        device = (float *)ckca__device_alloc(m->ctx, ckca__mul((size_t)n, values * sizeof(float)));
        if (!device) status = ckca__fail(m->ctx, CKCA_ENOMEM, "ckca_get_batch: out of memory for %d pictures", n);
    }
    if (device && !(status = ckca__send_batch(m->ctx, data, index, n, epoch, 0, &b))) {
        if (b.fed) index = b.fed->position;
        ckca__make_batch(m, data, n, augment, seed, &b, device);
        ckca__device_download(m->ctx, pictures, device, (size_t)n * values * sizeof(float));
        for (i = 0; labels && i < n; i++) labels[i] = ckca_label(data, index[i]);
        status = ckca__device_status(m->ctx);
    }
    ckca__device_release(m->ctx, device, (size_t)n * values * sizeof(float));
    ckca__batch_buffers_free(m->ctx, &b);
    if (status) ckca__unbind_data(m, had_names, was_normalized);
    return status;
}

/* ---- evaluation and prediction; binding a model to data ---- */

CKCA_API ckca_status ckca_evaluate(ckca_model *m, const ckca_data *data, ckca_score *score, float *per_class) {
    ckca_score ignored;
    ckca_status status;
    int had_names, was_normalized;
    if (!m) return CKCA_EINVAL;
    m->ctx->agreed = 0;
    status = ckca__check_finished(m, "ckca_evaluate");
    if (!status && !data) status = ckca__null(m->ctx, "ckca_evaluate", "data");
    had_names = m->class_names != NULL;
    was_normalized = m->normalized;
    if (!status) status = ckca__bind_data(m, data, "evaluate");
    status = ckca__ranks_agree(m->ctx, "ckca_evaluate", status);
    if (!status && m->ctx->ranks.size > 1) {
        uint64_t hash = 0;
        status = ckca__ranks_agree(m->ctx, "ckca_evaluate", ckca__hash_weights(m, m->all, &hash));
        if (!status) status = ckca__ranks_same(m->ctx, "ckca_evaluate", "weights or running statistics", hash);
        if (!status) status = ckca__ranks_same(m->ctx, "ckca_evaluate", "pictures", ckca__hash_data(data, 0));
    }
    if (!status) status = ckca__evaluate_all(m, m, data, score ? score : &ignored, per_class, NULL, NULL, NULL, NULL);
    if (status) ckca__unbind_data(m, had_names, was_normalized);
    return status;
}

/* Class probabilities, or the features, of n pictures. */
static ckca_status ckca__outputs(ckca_model *m, const char *call, const unsigned char *pixels, int n, int features,
                                 float *out) {
    const size_t picture = m ? (size_t)m->height * (size_t)m->width * (size_t)m->channels : 0;
    int first, i, batch;
    ckca__batch_buffers b;
    unsigned char *device = NULL; /* the pixels of one batch */
    ckca__bound bound = {"n", 0, 1, INT_MAX, 0};
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__check_finished(m, call))) return status;
    if (!pixels || !out) return ckca__null(m->ctx, call, !pixels ? "pixels" : "out");
    bound.value = n;
    if ((status = ckca__check_bounds(m->ctx, call, &bound, 1))) return status;
    if (!m->normalized)
        return ckca__fail(m->ctx, CKCA_EINVAL, "%s: the model has no mean and std: train it, or give them in its desc",
                          call + 5);
    batch = n < CKCA__EVAL_BATCH ? n : CKCA__EVAL_BATCH;
    if ((status = ckca__batch_buffers_alloc(m->ctx, &b, batch, m->classes, 1))) return status;
    status = ckca__reserve(m, batch, CKCA__MODE_EVALUATE);
    if (!status && !(device = (unsigned char *)ckca__device_alloc(m->ctx, (size_t)batch * picture)))
        status = ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for %d pictures", call + 5, batch);
    for (i = 0; i < batch; i++) ((int *)ckca__host_input(&b, b.index))[i] = i;
    ckca__device_upload(m->ctx, b.block, b.host, b.input_bytes);
    for (first = 0; !status && first < n; first += batch) {
        const int count = n - first < batch ? n - first : batch;
        float *input = ckca__input_buffer(m, count, CKCA__MODE_EVALUATE);
        ckca__device_upload(m->ctx, device, pixels + (size_t)first * picture, (size_t)count * picture);
        ckca__op_batch(m->ctx, count, m->height, m->width, m->channels, device, 1, b.index, NULL, 0, NULL,
                       m->normalization, m->normalization + m->channels, input);
        ckca__run_forward(m, count, CKCA__MODE_EVALUATE, input);
        if (features) {
            ckca__device_download(m->ctx, out + (size_t)first * (size_t)m->features, ckca__value(m, m->pooled),
                                  (size_t)count * (size_t)m->features * sizeof(float));
            continue;
        }
        ckca__op_softmax(m->ctx, count, m->classes, ckca__value(m, m->logits), b.teacher_logits);
        ckca__device_download(m->ctx, out + (size_t)first * (size_t)m->classes, b.teacher_logits,
                              (size_t)count * (size_t)m->classes * sizeof(float));
    }
    ckca__device_release(m->ctx, device, (size_t)batch * picture);
    ckca__batch_buffers_free(m->ctx, &b);
    return status ? status : ckca__device_status(m->ctx);
}

CKCA_API ckca_status ckca_predict(ckca_model *m, const unsigned char *pixels, int n, float *out) {
    return ckca__outputs(m, "ckca_predict", pixels, n, 0, out);
}
CKCA_API ckca_status ckca_features(ckca_model *m, const unsigned char *pixels, int n, float *out) {
    return ckca__outputs(m, "ckca_features", pixels, n, 1, out);
}

/* Evaluates m on all of data, with the normalisation of like (m itself or, if m is a teacher, its student). per_class:
   classes accuracies, -1 for a class without pictures, or NULL. right: count, 1 for each picture whose most probable
   class is its label, or NULL. cache_logits (count x classes) and cache_features (count x features), on the device or
   NULL, get the outputs for every picture. class_sums (classes x features, on the host, or NULL): every picture's
   features are added to its class's. Several processes: each rank evaluates every size-th block of pictures, and all
   get the result. */
static ckca_status ckca__evaluate_all(ckca_model *m, const ckca_model *like, const ckca_data *data, ckca_score *score,
                                      float *per_class, int *right, float *cache_logits, float *cache_features,
                                      double *class_sums) {
    ckca_context *ctx = m->ctx;
    const int most = m->evaluation_batch ? m->evaluation_batch : CKCA__EVAL_BATCH;
    const int batch = data->count < most ? data->count : most;
    const size_t hit_bytes = (size_t)data->count * sizeof(int);
    int first, i, n, top1 = 0, top5 = 0, *seen = NULL, *position = NULL, *hit = NULL, *device_hit = NULL;
    float *features = NULL; /* of one batch, on the host */
    double sums[5] = {0, 0, 0, 0, 0}; /* cross-entropy */
    int skipped = 0;
    unsigned char *bad = NULL; /* count, with a feed: 1: skipped */
    ckca__sequence sequence = {ctx->ranks.rank * batch, data->count, batch, ctx->ranks.size * batch};
    ckca__batch_buffers b;
    ckca_status status = ckca__batch_buffers_alloc(ctx, &b, batch, m->classes, 1);
    if (status) return ckca__ranks_agree(ctx, "evaluate", status);
    if (!(status = ckca__reserve(m, batch, CKCA__MODE_EVALUATE)) &&
        !(status = ckca__prepare_data(ctx, data, batch, NULL, 0, ckca__plan_sequence, &sequence, &b))) {
        position = (int *)ckca__alloc(ctx, (size_t)batch * sizeof(int));
        seen = (int *)ckca__alloc(ctx, ((size_t)m->classes * 2 + 3) * sizeof(int));
        hit = (int *)ckca__alloc(ctx, hit_bytes);
        device_hit = (int *)ckca__device_alloc(ctx, hit_bytes);
        if (class_sums) features = (float *)ckca__alloc(ctx, (size_t)batch * (size_t)m->features * sizeof *features);
        bad = b.feed ? (unsigned char *)ckca__alloc(ctx, (size_t)data->count) : NULL;
        if (!position || !seen || !hit || !device_hit || (class_sums && !features) || (b.feed && !bad))
            status = ckca__fail(ctx, CKCA_ENOMEM, "evaluate: out of memory for %d classes, %d pictures", m->classes,
                                data->count);
        else if (ctx->ranks.size > 1) { /* 0 for the other ranks' blocks */
            ckca__device_zero(ctx, device_hit, hit_bytes);
            if (cache_logits)
                ckca__device_zero(ctx, cache_logits, (size_t)data->count * (size_t)m->classes * sizeof(float));
            if (cache_features)
                ckca__device_zero(ctx, cache_features, (size_t)data->count * (size_t)m->features * sizeof(float));
        }
    }
    for (first = 0; !status && first < data->count; first += n) {
        const size_t k = (size_t)m->classes, d = (size_t)m->features;
        float *input;
        n = data->count - first < batch ? data->count - first : batch;
        if (n < 1) break; /* never happens; avoids a compiler warning */
        if (first / batch % ctx->ranks.size != ctx->ranks.rank) continue;
        input = ckca__input_buffer(m, n, CKCA__MODE_EVALUATE);
        for (i = 0; i < n; i++) position[i] = first + i;
        if ((status = ckca__send_batch(ctx, data, position, n, 0, 0, &b))) break;
        ckca__make_batch(like, data, n, NULL, 0, &b, input);
        ckca__run_forward(m, n, CKCA__MODE_EVALUATE, input);
        ckca__op_cross_entropy(ctx, n, m->classes, ckca__value(m, m->logits), b.labels, 0.0f, 1.0f, NULL, b.loss,
                               device_hit + first);
        for (i = 0; bad && i < n; i++) { /* a skipped picture does not count, its substitute counts once */
            bad[first + i] = b.fed->bad[i];
            if (b.fed->bad[i]) ckca__device_zero(ctx, b.loss + i, sizeof(float));
        }
        ckca__op_sum(ctx, n, b.loss, b.sums);
        if (cache_logits)
            ckca__device_copy(ctx, cache_logits + (size_t)first * k, ckca__value(m, m->logits),
                              (size_t)n * k * sizeof(float));
        if (cache_features)
            ckca__device_copy(ctx, cache_features + (size_t)first * d, ckca__value(m, m->pooled),
                              (size_t)n * d * sizeof(float));
        if (class_sums) ckca__device_download(ctx, features, ckca__value(m, m->pooled), (size_t)n * d * sizeof(float));
        for (i = 0; class_sums && i < n; i++) {
            double *sum = class_sums + (size_t)data->store->labels[data->index[first + i]] * d;
            size_t j;
            if (bad && bad[first + i]) continue;
            for (j = 0; j < d; j++) sum[j] += features[(size_t)i * d + j];
        }
    }
    if (!status) {
        ckca__device_download(ctx, sums, b.sums, sizeof *sums);
        ckca__device_download(ctx, hit, device_hit, hit_bytes);
        status = ckca__device_status(ctx);
    }
    status = ckca__ranks_agree_on(ctx, "evaluate", status, sums);
    if (!status && class_sums)
        status = ckca__ranks_sum_values(ctx, "evaluate", class_sums, (size_t)m->classes * (size_t)m->features);
    if (!status && ctx->ranks.size > 1) {
        if (cache_logits) ckca__device_ranks_sum(ctx, (size_t)data->count * (size_t)m->classes, 1, cache_logits);
        if (cache_features) ckca__device_ranks_sum(ctx, (size_t)data->count * (size_t)m->features, 1, cache_features);
        if (cache_logits || cache_features) ckca__device_ranks_wait(ctx);
        status = ckca__ranks_agree(ctx, "evaluate", ckca__device_status(ctx));
    }
    if (!status) {
        for (i = 0; i < data->count; i++) {
            int *of_class;
            if (bad && bad[i]) {
                skipped++;
                continue;
            }
            of_class = seen + 2 * data->store->labels[data->index[i]];
            of_class[0] += i / batch % ctx->ranks.size == ctx->ranks.rank;
            of_class[1] += hit[i] & 1;
            top1 += hit[i] & 1;
            top5 += hit[i] >> 1 & 1;
            if (right) right[i] = hit[i] & 1;
        }
        seen[2 * m->classes] = top1;
        seen[2 * m->classes + 1] = top5;
        seen[2 * m->classes + 2] = skipped;
        status = ckca__ranks_sum_counts(ctx, "evaluate", seen, 2 * m->classes + 3);
        top1 = seen[2 * m->classes];
        top5 = seen[2 * m->classes + 1];
        skipped = seen[2 * m->classes + 2];
        if (!status && right) status = ckca__ranks_sum_counts(ctx, "evaluate", right, data->count);
    }
    if (!status) {
        score->count = data->count - skipped;
        score->top1 = (double)top1 / score->count;
        score->top5 = (double)top5 / score->count;
        score->loss = sums[0] / score->count;
        for (i = 0; per_class && i < m->classes; i++)
            per_class[i] = seen[2 * i] ? (float)seen[2 * i + 1] / (float)seen[2 * i] : -1.0f;
    }
    ckca__release(ctx, position);
    ckca__release(ctx, bad);
    ckca__release(ctx, seen);
    ckca__release(ctx, hit);
    ckca__release(ctx, features);
    ckca__device_release(ctx, device_hit, hit_bytes);
    ckca__batch_buffers_free(ctx, &b);
    return status;
}

/* ---- heads without training ---- */

/* What ckca_imprint works on, on the host. */
typedef struct ckca__imprint {
    const ckca_data *data;
    int k, d, first;
    float *features, *logits; /* of every picture: count x d, count x k */
    double *mean, *centre;    /* k x d; d: the mean of the classes' means, 0 if there is one class */
    double *score;            /* count x k: a constant of the picture plus what its logits are at scale 1 */
    int *count;               /* pictures of each class */
    float *w, *b;             /* the head: k x d, k */
} ckca__imprint;

static int ckca__imprint_label(const ckca__imprint *a, int i) { return a->data->store->labels[a->data->index[i]]; }

static void ckca__imprint_means(ckca__imprint *a) {
    const size_t d = (size_t)a->d;
    size_t j;
    int i, seen = 0;
    for (i = 0; i < a->data->count; i++) {
        double *mean = a->mean + (size_t)ckca__imprint_label(a, i) * d;
        const float *f = a->features + (size_t)i * d;
        a->count[ckca__imprint_label(a, i)]++;
        for (j = 0; j < d; j++) mean[j] += (double)f[j];
    }
    for (i = 0; i < a->k; i++) {
        if (!a->count[i]) continue;
        seen++;
        for (j = 0; j < d; j++) {
            a->mean[(size_t)i * d + j] /= a->count[i];
            a->centre[j] += a->mean[(size_t)i * d + j];
        }
    }
    for (j = 0; j < d; j++) a->centre[j] = seen > 1 ? a->centre[j] / seen : 0;
}

/* The mean cross-entropy of the scores times scale. */
static double ckca__imprint_loss(const ckca__imprint *a, double scale) {
    double loss = 0;
    int i, j;
    for (i = 0; i < a->data->count; i++) {
        const double *z = a->score + (size_t)i * (size_t)a->k;
        double most = z[0], sum = 0;
        for (j = 1; j < a->k; j++)
            if (z[j] > most) most = z[j];
        for (j = 0; j < a->k; j++) sum += exp(scale * (z[j] - most));
        loss += log(sum) - scale * (z[ckca__imprint_label(a, i)] - most);
    }
    return loss / a->data->count;
}

/* With m_k = mean_k - centre: -|f - mean_k|^2 / 2 = f m_k - (centre m_k + |m_k|^2 / 2) + a constant of f. */
static void ckca__imprint_all(ckca__imprint *a) {
    const size_t d = (size_t)a->d, k = (size_t)a->k;
    double best = 0, least = 0;
    size_t i, j, e;
    int power;
    for (j = 0; j < k; j++) {
        double bias = 0;
        for (e = 0; e < d; e++) {
            const double m = a->mean[j * d + e] - a->centre[e];
            a->w[j * d + e] = (float)m;
            bias -= m * (a->centre[e] + m / 2);
        }
        a->b[j] = (float)bias;
    }
    for (i = 0; i < (size_t)a->data->count; i++)
        for (j = 0; j < k; j++) {
            double sum = (double)a->b[j];
            for (e = 0; e < d; e++) sum += (double)a->features[i * d + e] * (double)a->w[j * d + e];
            a->score[i * k + j] = sum;
        }
    for (power = -40; power <= 40; power++) {
        const double scale = pow(2, 0.5 * power), loss = ckca__imprint_loss(a, scale);
        if (power > -40 && !(loss < least)) continue;
        least = loss;
        best = scale;
    }
    for (j = 0; j < k; j++) a->b[j] = (float)(best * (double)a->b[j]);
    for (j = 0; j < k * d; j++) a->w[j] = (float)(best * (double)a->w[j]);
}

static void ckca__imprint_new(ckca__imprint *a) {
    const size_t d = (size_t)a->d, k = (size_t)a->k, first = (size_t)a->first;
    double length = 0;
    size_t j, e;
    int i;
    for (j = 0; j < first; j++) {
        double square = 0;
        for (e = 0; e < d; e++) square += (double)a->w[j * d + e] * (double)a->w[j * d + e];
        length += sqrt(square) / (double)first;
    }
    for (j = first; j < k; j++) {
        double square = 0, bias = 0, own = 0;
        for (e = 0; e < d; e++) {
            const double m = a->mean[j * d + e] - a->centre[e];
            square += m * m;
        }
        for (e = 0; e < d; e++) {
            const double m = a->mean[j * d + e] - a->centre[e];
            a->w[j * d + e] = square > 0 ? (float)(m * (length / sqrt(square))) : 0.0f;
            own += a->mean[j * d + e] * (double)a->w[j * d + e];
        }
        for (i = 0; i < a->data->count; i++) {
            const float *z = a->logits + (size_t)i * k;
            float most = z[0];
            if ((size_t)ckca__imprint_label(a, i) != j) continue;
            for (e = 1; e < first; e++)
                if (z[e] > most) most = z[e];
            bias += (double)most / a->count[j];
        }
        a->b[j] = (float)(bias - own);
    }
}

CKCA_API ckca_status ckca_imprint(ckca_model *m, const ckca_data *data, int first) {
    ckca__imprint a;
    ckca__bound bound = {"first", 0, 0, 0, 0};
    ckca_context *ctx;
    ckca_score score;
    float *device_features = NULL, *device_logits = NULL;
    size_t features, logits, k, d;
    int i, had_names, was_normalized;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    ctx = m->ctx;
    if ((status = ckca__check_finished(m, "ckca_imprint"))) return status;
    if (!data) return ckca__null(ctx, "ckca_imprint", "data");
    bound.value = first;
    bound.most = m->classes - 1;
    if ((status = ckca__check_bounds(ctx, "ckca_imprint", &bound, 1))) return status;
    had_names = m->class_names != NULL;
    was_normalized = m->normalized;
    if ((status = ckca__bind_data(m, data, "imprint"))) return status;
    memset(&a, 0, sizeof a);
    a.data = data;
    a.k = m->classes;
    a.d = m->features;
    a.first = first;
    k = (size_t)a.k;
    d = (size_t)a.d;
    features = ckca__mul((size_t)data->count, d * sizeof(float));
    logits = ckca__mul((size_t)data->count, k * sizeof(float));
    a.features = (float *)ckca__alloc(ctx, features);
    a.logits = (float *)ckca__alloc(ctx, logits);
    a.score = first ? NULL : (double *)ckca__alloc(ctx, ckca__mul(logits, 2));
    a.mean = (double *)ckca__alloc(ctx, ckca__mul(k * d, sizeof(double)));
    a.centre = (double *)ckca__alloc(ctx, d * sizeof(double));
    a.count = (int *)ckca__alloc(ctx, k * sizeof(int));
    a.w = (float *)ckca__alloc(ctx, k * d * sizeof(float));
    a.b = (float *)ckca__alloc(ctx, k * sizeof(float));
    device_features = (float *)ckca__device_alloc(ctx, features);
    device_logits = (float *)ckca__device_alloc(ctx, logits);
    if (!a.features || !a.logits || (!first && !a.score) || !a.mean || !a.centre || !a.count || !a.w || !a.b ||
        !device_features || !device_logits)
        status = ckca__fail(ctx, CKCA_ENOMEM, "imprint: out of memory for the features of %d pictures", data->count);
    if (!status) status = ckca__evaluate_all(m, m, data, &score, NULL, NULL, device_logits, device_features, NULL);
    if (!status) {
        const ckca__node *head = &m->node[m->logits];
        float *w = ckca__param(m, head, m->values, CKCA__PARAM_WEIGHT);
        float *b = ckca__param(m, head, m->values, CKCA__PARAM_BIAS);
        ckca__device_download(ctx, a.features, device_features, features);
        ckca__device_download(ctx, a.logits, device_logits, logits);
        ckca__device_download(ctx, a.w, w, k * d * sizeof(float));
        ckca__device_download(ctx, a.b, b, k * sizeof(float));
        if (!(status = ckca__device_status(ctx))) ckca__imprint_means(&a);
        for (i = first; !status && i < a.k; i++)
            if (!a.count[i])
                status =
                    ckca__fail(ctx, CKCA_EINVAL, "imprint: class %d (\"%.60s\") has no picture", i, m->class_names[i]);
        if (!status) {
            if (first)
                ckca__imprint_new(&a);
            else
                ckca__imprint_all(&a);
            for (i = 0; !status && i < a.k * a.d; i++)
                if (!isfinite(a.w[i]) || !isfinite(a.b[i / a.d]))
                    status = ckca__fail(ctx, CKCA_ENAN, "imprint: the features of class %d are not finite", i / a.d);
        }
        if (!status) {
            ckca__device_upload(ctx, w, a.w, k * d * sizeof(float));
            ckca__device_upload(ctx, b, a.b, k * sizeof(float));
            m->folded_valid = m->frozen_valid = 0;
            m->n = 0;
            status = ckca__device_status(ctx);
        }
    }
    ckca__device_release(ctx, device_features, features);
    ckca__device_release(ctx, device_logits, logits);
    ckca__release(ctx, a.features);
    ckca__release(ctx, a.logits);
    ckca__release(ctx, a.score);
    ckca__release(ctx, a.mean);
    ckca__release(ctx, a.centre);
    ckca__release(ctx, a.count);
    ckca__release(ctx, a.w);
    ckca__release(ctx, a.b);
    if (status) ckca__unbind_data(m, had_names, was_normalized);
    return status;
}

/* The class means of m, and none yet for the classes that copy has more. */
static ckca_status ckca__widen_centroids(ckca_model *copy, const ckca_model *m) {
    const size_t known = (size_t)m->classes;
    ckca__release(m->ctx, copy->centroids.count);
    copy->centroids.count = NULL;
    if (m->centroids.count && ckca__fits_featreg(copy, copy, CKCA_FEATREG_CENTROID)) {
        if (!ckca__centroids_alloc(copy, &copy->centroids))
            return ckca__fail(m->ctx, CKCA_ENOMEM, "ckca_add_classes: out of memory for the means of %d classes",
                              copy->classes);
        memcpy(copy->centroids.count, m->centroids.count, known * sizeof(int64_t));
        memcpy(copy->centroids.mean, m->centroids.mean, known * (size_t)m->features * sizeof(float));
    }
    return ckca__device_status(m->ctx);
}

/* Gives copy, a copy of m, the head of classes outputs: lays its parameters out anew and copies m's values. */
static ckca_status ckca__widen(ckca_model *copy, const ckca_model *m, int classes) {
    ckca_context *ctx = m->ctx;
    ckca__node *head = &copy->node[copy->logits];
    ckca__parameter *w = &copy->parameter[head->tensor], *b = w + 1;
    const size_t d = (size_t)m->features, k = (size_t)m->classes;
    float *host, *rows;
    size_t i, j;
    int p;
    ckca__device_release(ctx, copy->values, copy->all * sizeof(float));
    copy->values = NULL;
    copy->classes = head->c = w->shape[0] = b->shape[0] = classes;
    w->count = (size_t)classes * d;
    b->count = (size_t)classes;
    ckca__layout_parameters(copy);
    ckca__layout_training(copy);
    copy->values = (float *)ckca__device_alloc(ctx, copy->all * sizeof(float));
    host = (float *)ckca__alloc(ctx, (w->count + b->count) * sizeof(float));
    if (!copy->values || !host) {
        ckca__release(ctx, host);
        return ckca__fail(ctx, CKCA_ENOMEM, "ckca_add_classes: out of memory for %d classes", classes);
    }
    ckca__device_zero(ctx, copy->values, copy->all * sizeof(float));
    for (p = 0; p < m->parameters; p++)
        ckca__device_copy(ctx, copy->values + copy->parameter[p].offset, m->values + m->parameter[p].offset,
                          m->parameter[p].count * sizeof(float));
    rows = host + b->count;
    ckca__device_download(ctx, rows, copy->values + w->offset, w->count * sizeof(float));
    ckca__device_download(ctx, host, copy->values + b->offset, b->count * sizeof(float));
    for (j = 0; j <= d; j++) { /* the bias, then every column of the weight */
        double mean = 0;
        for (i = 0; i < k; i++) mean += (double)(j ? rows[i * d + j - 1] : host[i]) / (double)k;
        for (i = k; i < (size_t)classes; i++) *(j ? &rows[i * d + j - 1] : &host[i]) = (float)mean;
    }
    ckca__device_upload(ctx, copy->values + w->offset, rows, w->count * sizeof(float));
    ckca__device_upload(ctx, copy->values + b->offset, host, b->count * sizeof(float));
    ckca__release(ctx, host);
    return ckca__widen_centroids(copy, m);
}

CKCA_API ckca_status ckca_add_classes(ckca_model *m, const char *const *names, int count) {
    ckca__bound bound = {"count", 0, 1, 0, 0};
    const char **all = NULL;
    char **copied = NULL;
    ckca_model *copy = NULL, swap;
    ckca_context *ctx;
    ckca_status status;
    int i;
    if (!m) return CKCA_EINVAL;
    ctx = m->ctx;
    if ((status = ckca__check_finished(m, "ckca_add_classes"))) return status;
    if (!names) return ckca__null(ctx, "ckca_add_classes", "names");
    bound.value = count;
    bound.most = CKCA__CLASSES_MAX - m->classes;
    if ((status = ckca__check_bounds(ctx, "ckca_add_classes", &bound, 1))) return status;
    if (!m->class_names)
        return ckca__fail(ctx, CKCA_EINVAL,
                          "ckca_add_classes: the model has no class names yet: give them in its desc");
    if (ckca__mul((size_t)(m->classes + count), (size_t)m->features) > CKCA__VALUES_MAX)
        return ckca__fail(ctx, CKCA_ESHAPE, "ckca_add_classes: a head of %d classes and %d features is too large",
                          m->classes + count, m->features);
    all = (const char **)ckca__alloc(ctx, (size_t)(m->classes + count) * sizeof *all);
    if (!all) return ckca__fail(ctx, CKCA_ENOMEM, "ckca_add_classes: out of memory for %d classes", m->classes + count);
    for (i = 0; i < m->classes + count; i++) all[i] = i < m->classes ? m->class_names[i] : names[i - m->classes];
    status = ckca__check_names(ctx, "ckca_add_classes", all, m->classes + count);
    if (!status) {
        copied = ckca__copy_names(ctx, all, m->classes + count);
        if (!copied)
            status = ckca__fail(ctx, CKCA_ENOMEM, "ckca_add_classes: out of memory for %d classes", m->classes + count);
    }
    ckca__release(ctx, (void *)all);
    if (!status) status = ckca_model_copy(&copy, m);
    if (!status) {
        ckca__free_names(ctx, copy->class_names, copy->classes);
        copy->class_names = NULL;
        status = ckca__widen(copy, m, m->classes + count);
    }
    if (status) {
        ckca__free_names(ctx, copied, m->classes + count);
        ckca_model_free(copy);
        return status;
    }
    copy->class_names = copied;
    copy->known = m->known ? m->known : m->classes;
    copy->unsaved = m->unsaved;
    m->unsaved = NULL;
    swap = *m;
    *m = *copy;
    *copy = swap;
    ckca_model_free(copy);
    return CKCA_OK;
}

/* Checks that data fits the model: shape and classes. A model without class names or normalisation gets them from data.
   what begins the messages. */
static ckca_status ckca__bind_data(ckca_model *m, const ckca_data *data, const char *what) {
    ckca_context *ctx = m->ctx;
    const ckca__store *store = data->store;
    int i;
    if (store->height != m->height || store->width != m->width || store->channels != m->channels)
        return ckca__fail(ctx, CKCA_ESHAPE, "%s: the pictures are %d x %d x %d, the model takes %d x %d x %d", what,
                          store->height, store->width, store->channels, m->height, m->width, m->channels);
    if (store->classes != m->classes)
        return ckca__fail(ctx, CKCA_ESHAPE, "%s: the data has %d classes, the model has %d", what, store->classes,
                          m->classes);
    for (i = 0; m->class_names && i < m->classes; i++)
        if (strcmp(m->class_names[i], store->class_names[i]))
            return ckca__fail(ctx, CKCA_EINVAL, "%s: class %d is \"%.60s\" in the data, \"%.60s\" in the model", what,
                              i, store->class_names[i], m->class_names[i]);
    if (!m->class_names) {
        m->class_names = ckca__copy_names(ctx, (const char *const *)store->class_names, m->classes);
        if (!m->class_names)
            return ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for %d class names", what, m->classes);
    }
    return m->normalized ? CKCA_OK : ckca__measure_pictures(m, data);
}

/* Sets m's mean and std to those of data. */
static ckca_status ckca__measure_pictures(ckca_model *m, const ckca_data *data) {
    ckca_context *ctx = m->ctx;
    const size_t area = (size_t)m->height * (size_t)m->width, stride = (size_t)m->channels;
    const int size = data->count < CKCA__EVAL_BATCH ? data->count : CKCA__EVAL_BATCH;
    ckca__sequence sequence = {0, data->count, size, size};
    ckca__sequence plan = sequence; /* read ahead of sequence */
    ckca__feed *feed = NULL;
    ckca__feed_batch *b = NULL;
    int *position, i, n, epoch, counted = 0, channel;
    uint64_t sum[3] = {0, 0, 0}, squares[3] = {0, 0, 0}; /* exact for up to 2^48 values */
    ckca_status status = CKCA_OK;
    position = (int *)ckca__alloc(ctx, (size_t)sequence.size * sizeof *position);
    if (!position) return ckca__fail(ctx, CKCA_ENOMEM, "out of memory to read %d pictures", sequence.size);
    if (ckca__needs_feed(data->store, NULL))
        status = ckca__feed_open(ctx, &feed, data, sequence.size, NULL, 0, ckca__plan_sequence, &plan);
    while (!status && (n = ckca__plan_sequence(&sequence, position, &epoch)) > 0) {
        if (feed) status = ckca__feed_take(feed, position, n, epoch, &b);
        for (i = 0; !status && i < n; i++) {
            const unsigned char *p = b ? b->pixels + (size_t)i * area * stride : ckca_pixels(data, position[i]);
            size_t j;
            if (b && b->bad[i]) continue;
            counted++;
            for (channel = 0; channel < m->channels; channel++)
                for (j = 0; j < area; j++) {
                    unsigned value = p[j * stride + (size_t)channel];
                    sum[channel] += value;
                    squares[channel] += value * value;
                }
        }
    }
    for (channel = 0; !status && channel < m->channels; channel++) {
        const double count = (double)area * counted, mean = (double)sum[channel] / count;
        const double variance = (double)squares[channel] / count - mean * mean;
        m->normalization[channel] = (float)(mean / 255.0);
        m->normalization[m->channels + channel] = variance > 1e-6 ? (float)(sqrt(variance) / 255.0) : 1.0f;
    }
    if (!status) m->normalized = 1;
    ckca__feed_free(feed);
    ckca__release(ctx, position);
    return status;
}

/* ===================================================================================================================
   EXECUTION                                                                                               >>execution

   The forward pass, the backward pass and the SGD step, each one loop over the nodes or the arenas; then the public
   calls for them, and for reading and writing tensors.
   =================================================================================================================== */

/* In RANKS: */
static void ckca__sum_bucket(ckca_model *m, int i);

/* Below: */
static int ckca__reads_output(const ckca_model *m, int i);
static void ckca__fold(ckca_model *m, int mode);
static void ckca__pack_weights(ckca_model *m, int mode);
static void ckca__recompute_outputs(ckca_model *m, int i, int *next);

/* ---- which nodes run, and where their values are ---- */

/* 1 if node i runs an op of its own in this mode; 0 if a later tail runs it. */
static int ckca__runs(const ckca_model *m, int i, int mode) {
    return !m->node[i].fused && !(m->node[i].folded && (!(mode & CKCA__MODE_TRAIN) || m->node[i].evaluates));
}

/* 1 if node i runs as in training in this mode. */
static int ckca__trains(const ckca_model *m, int i, int mode) {
    return (mode & CKCA__MODE_TRAIN) && !m->node[i].constant;
}

/* 1 if the output of node i is read after the forward pass, or its gradient starts the backward pass. */
static int ckca__is_output(const ckca_model *m, int i, int mode) {
    return i == m->logits || i == m->pooled || (m->node[i].stage && (mode & CKCA__MODE_STAGES));
}

/* 1 if the gradient of batch norm i's input can overwrite that input: no other node reads it, nor does the backward of
   the node that computed it. */
static int ckca__in_place(const ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    return !x->fused && x->head >= 0 && x->source > 0 && m->node[x->source].readers == 1 && !m->node[x->source].relu &&
           !ckca__reads_output(m, x->source);
}

/* 1 if batch norm i only computes statistics, because the only node that reads it normalises while reading. */
static int ckca__is_fused_into_reader(const ckca_model *m, int i, int mode) {
    const ckca__node *x = &m->node[i], *reader = x + 1, *end = m->node + m->nodes;
    ckca__conv s;
    if (!ckca__trains(m, i, mode) || (mode & CKCA__MODE_READABLE) || x->fused || x->head < 0 || x->residual >= 0 ||
        x->readers != 1 || ckca__is_output(m, i, mode))
        return 0;
    while (reader < end && (reader->fused || (reader->source != i && reader->residual != i))) reader++;
    if (reader == end) return 0;
    if (reader->residual == i) return reader->head >= 0;
    if (!(ckca__layer_of(m, (int)(reader - m->node))->flags & CKCA__LAYER_NORMALIZES)) return 0;
    ckca__shape(m, reader, 1, mode, &s);
    return ckca__may_norm(m->ctx, &s);
}

/* 1 if the backward of node i reads its output. A batch norm's tail with a residual needs it to know where its ReLU was
   positive; without a residual it can tell from its input. */
static int ckca__reads_output(const ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    if (x->head >= 0) return x->relu && x->residual >= 0;
    return (ckca__layer_of(m, i)->flags & CKCA__LAYER_READS_OUTPUT) != 0;
}

/* The node whose stored values a reader of node i reads, and in *norm what the reader applies to them, or NULL. norm may
   be NULL. */
static int ckca__stored_node(const ckca_model *m, int i, int mode, const ckca__norm **norm) {
    const int fused = i >= 0 && m->node[i].fused_into_reader[mode];
    if (norm) *norm = fused ? &m->node[i].norm : NULL;
    return fused ? m->node[i].source : i;
}

/* The shape of a convolution, pooling or subsample node for n pictures. */
static void ckca__shape(const ckca_model *m, const ckca__node *node, int n, int mode, ckca__conv *s) {
    const ckca__node *x = &m->node[node->in[0]];
    s->bf16_x = x->bf16;
    s->bf16 = node->bf16;
    s->packed_weights = m->packed_weights ? (char *)m->packed_weights + node->packed_weights : NULL;
    s->statistics = NULL;
    s->n = n;
    s->h = x->h;
    s->w = x->w;
    s->c = x->c;
    s->k = node->c;
    s->r = s->s = node->kernel;
    s->stride = node->stride;
    s->pad = node->pad;
    s->p = node->h;
    s->q = node->w;
    s->norm = m->node[node->source].fused_into_reader[mode] ? &m->node[node->source].norm : NULL;
    s->groups = node->kind == CKCA__KIND_CONV ? node->groups : 0;
}

/* The output of node i: n x h x w x c, where n is m->n. */
static float *ckca__value(const ckca_model *m, int i) {
    return i == 0 ? (float *)(uintptr_t)m->input : m->activations + m->node[i].value[m->mode] * (size_t)m->n;
}
/* The same during the backward pass, where it may have been recomputed. */
static float *ckca__backward_value(const ckca_model *m, int i) {
    return i == 0 ? ckca__value(m, 0) : m->activations + m->node[i].backward_value * (size_t)m->n;
}
static float *ckca__grad(const ckca_model *m, int i) {
    return m->activations + m->node[i].grad[m->mode] * (size_t)m->n;
}
/* What node i's forward saves for its backward beside the output, see ckca__layer. */
static void *ckca__side(const ckca_model *m, int i) { return m->activations + m->node[i].side[m->mode] * (size_t)m->n; }
/* The input of node i in the forward pass, and in the backward pass. */
static const float *ckca__input(const ckca_model *m, int i) {
    return ckca__value(m, ckca__stored_node(m, m->node[i].source, m->mode, NULL));
}
static const float *ckca__backward_input(const ckca_model *m, int i) {
    return ckca__backward_value(m, ckca__stored_node(m, m->node[i].source, m->mode, NULL));
}
/* Where a backward writes the gradient of node i, or adds to it if *add is 1. NULL if it is not needed: the pictures'
   (i is 0) or one of frozen layers, or no node (i is -1). */
static float *ckca__grad_into(ckca_model *m, int i, int *add) {
    const int needed = i > 0 && !m->node[i].constant;
    *add = needed ? ckca__accumulates(m, i) : 0;
    return needed ? ckca__grad(m, i) : NULL;
}
/* Parameter which (CKCA__PARAM_...) of a node in an arena. */
static float *ckca__param(const ckca_model *m, const ckca__node *node, float *arena, int which) {
    return arena + m->parameter[node->tensor + which].offset;
}
/* The gradient of such a parameter; NULL if the node is frozen. */
static float *ckca__gradient(const ckca_model *m, const ckca__node *node, int which) {
    return node->rate > 0 ? m->gradients + m->parameter[node->tensor + which].slot : NULL;
}
static size_t ckca__rows(const ckca__node *x, int n) { return (size_t)n * (size_t)x->h * (size_t)x->w; }

/* Where the caller writes n pictures (n x height x width x channels) before ckca__run_forward. */
static float *ckca__input_buffer(ckca_model *m, int n, int mode) {
    return m->activations + m->node[0].value[mode] * (size_t)n;
}

/* ---- forward ---- */

/* Runs n pictures at input (n x height x width x channels, on the device) through the network. Needs ckca__reserve. */
static void ckca__run_forward(ckca_model *m, int n, int mode, const float *input) {
    const int training = mode & CKCA__MODE_TRAIN;
    int i;
    if (training)
        ckca__pack_weights(m, mode);
    else if (!m->folded_valid)
        ckca__fold(m, mode);
    m->n = n;
    m->mode = mode;
    m->input = input;
    for (i = 1; i < m->nodes; i++)
        if (ckca__runs(m, i, mode)) ckca__layer_of(m, i)->forward(m, i);
    if (training) {
        m->batches_tracked++;
        m->folded_valid = 0;
    }
}

/* Folds batch norm i into the convolution before it. */
static void ckca__fold_one(ckca_model *m, int i) {
    const ckca__node *bn = &m->node[i], *conv = &m->node[bn->in[0]];
    const ckca__parameter *p = &m->parameter[conv->tensor];
    ckca__op_fold(m->ctx, conv->c, p->count / (size_t)conv->c, ckca__param(m, conv, m->values, CKCA__PARAM_WEIGHT),
                  conv->bias ? ckca__param(m, conv, m->values, CKCA__PARAM_BIAS) : NULL,
                  ckca__param(m, bn, m->values, CKCA__PARAM_GAMMA), ckca__param(m, bn, m->values, CKCA__PARAM_BETA),
                  ckca__param(m, bn, m->values, CKCA__PARAM_MEAN), ckca__param(m, bn, m->values, CKCA__PARAM_VAR),
                  ckca__param(m, conv, m->folded, CKCA__PARAM_WEIGHT), ckca__param(m, bn, m->folded, CKCA__PARAM_BETA));
}

/* Folds every batch norm that follows a convolution into its weights, for evaluation. */
static void ckca__fold(ckca_model *m, int mode) {
    int i;
    for (i = 0; i < m->nodes; i++)
        if (m->node[i].kind == CKCA__KIND_BATCHNORM && m->node[m->node[i].in[0]].folded) ckca__fold_one(m, i);
    ckca__pack_weights(m, mode);
    m->folded_valid = 1;
}

/* Before the first training forward pass with these weights: folds what runs as in evaluation, and sets the statistics
   of the other frozen batch norms, the running ones. Needs ckca__reserve. */
static ckca_status ckca__prepare_frozen(ckca_model *m) {
    int i, j;
    if (m->frozen_valid) return CKCA_OK;
    for (i = 0; i < m->nodes; i++) {
        const ckca__node *bn = &m->node[i];
        const size_t c = (size_t)bn->c, pitch = ckca__round_up(c, CKCA__ALIGN / sizeof(float));
        float *host;
        if (bn->kind != CKCA__KIND_BATCHNORM || bn->rate > 0) continue;
        if (m->node[bn->in[0]].evaluates) {
            ckca__fold_one(m, i);
            continue;
        }
        host = (float *)ckca__alloc(m->ctx, 2 * pitch * sizeof(float));
        if (!host) return ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for its statistics", bn->name);
        ckca__device_download(m->ctx, host, ckca__param(m, bn, m->values, CKCA__PARAM_MEAN), c * sizeof(float));
        ckca__device_download(m->ctx, host + pitch, ckca__param(m, bn, m->values, CKCA__PARAM_VAR), c * sizeof(float));
        for (j = 0; j < bn->c; j++)
            host[pitch + (size_t)j] = (float)(1 / sqrt((double)host[pitch + (size_t)j] + 1e-5)); /* eps */
        ckca__device_upload(m->ctx, m->saved + bn->saved, host, 2 * pitch * sizeof(float));
        ckca__release(m->ctx, host);
    }
    m->frozen_valid = 1;
    return ckca__device_status(m->ctx);
}

/* Where the statistics of a batch norm with this tail go in training. */
static ckca__statistics ckca__statistics_of(const ckca_model *m, const ckca__node *tail) {
    const ckca__node *bn = &m->node[tail->head];
    ckca__statistics s;
    s.mean = m->saved + bn->saved;
    s.inv_std = s.mean + ckca__round_up((size_t)bn->c, 16);
    s.running_mean = ckca__param(m, bn, m->values, CKCA__PARAM_MEAN);
    s.running_var = ckca__param(m, bn, m->values, CKCA__PARAM_VAR);
    return s;
}

/* Packs the weights of all convolutions: before every training forward pass, and in evaluation after folding. */
static void ckca__pack_weights(ckca_model *m, int mode) {
    enum { PER_CALL = 32 };
    ckca__conv s[PER_CALL];
    const float *w[PER_CALL];
    size_t offset = 0;
    int i, count, backward; /* 1: with what the input gradient reads */
    for (backward = 0; backward < 2 && m->packed_weights; backward++) {
        for (i = 1, count = 0; i < m->nodes; i++) {
            ckca__node *x = &m->node[i];
            const int folded = x->folded && !ckca__runs(m, i, mode);
            if (!ckca__has_flag(m, i, CKCA__LAYER_CONVOLUTION) || ckca__trains(m, i, mode) != backward) continue;
            x->packed_weights = offset;
            ckca__shape(m, x, 1, mode, &s[count]);
            offset += ckca__packed_bytes(m->ctx, &s[count], backward);
            w[count++] = ckca__param(m, x, folded ? m->folded : m->values, CKCA__PARAM_WEIGHT);
            if (count < PER_CALL) continue;
            ckca__op_pack_weights(m->ctx, count, s, w, backward);
            count = 0;
        }
        if (count) ckca__op_pack_weights(m->ctx, count, s, w, backward);
    }
}

/* ---- backward ---- */

/* Runs all nodes backward. The caller has written the gradient of the logits, and possibly of other outputs, to
   ckca__grad and set their has_grad. */
static void ckca__run_backward(ckca_model *m) {
    int i, next = 0;
    for (i = 0; i < m->nodes; i++) m->node[i].backward_value = m->node[i].value[m->mode];
    m->summed_from = m->trained_decayed;
    for (i = m->nodes - 1; i > 0; i--) {
        if (!m->node[i].fused && m->node[i].has_grad) {
            ckca__recompute_outputs(m, i, &next);
            ckca__layer_of(m, i)->backward(m, i);
        }
        if (m->sums_gradients) ckca__sum_bucket(m, i);
    }
}

/* 1 if node i's gradient already has a value, so that the caller must add to it. Sets has_grad. */
static int ckca__accumulates(ckca_model *m, int i) {
    int was = m->node[i].has_grad;
    m->node[i].has_grad = 1;
    return was;
}

/* Recomputes the outputs that node i's backward reads. *next: the first item of the list that is not done yet. */
static void ckca__recompute_outputs(ckca_model *m, int i, int *next) {
    for (; *next < m->recomputes[m->mode] && m->recompute[m->mode][*next].before >= i; ++*next) {
        const ckca__recompute *item = &m->recompute[m->mode][*next];
        ckca__node *x = &m->node[item->node];
        const ckca__norm *residual_norm;
        const int other = ckca__stored_node(m, x->residual, m->mode, &residual_norm);
        const float *residual = other >= 0 ? ckca__backward_value(m, other) : NULL;
        x->backward_value = item->offset;
        ckca__op_batchnorm_recompute(m->ctx, x->bf16, ckca__rows(x, m->n), x->c, ckca__backward_value(m, x->source),
                                     &x->norm, residual, residual_norm, ckca__backward_value(m, item->node));
    }
}

static void ckca__clear_has_grad(ckca_model *m) {
    int i;
    for (i = 0; i < m->nodes; i++) m->node[i].has_grad = 0;
}

/* ---- SGD ---- */

/* One SGD step on all parameters that are not frozen, in runs of neighbours with one factor of the learning rate.
   Weight decay applies to the first m->decayed floats. lr and gscale point to one float each on the device; d->lr is
   ignored. */
static void ckca__run_sgd(ckca_model *m, const ckca_sgd_desc *d, const float *lr, float *gscale) {
    ckca_context *ctx = m->ctx;
    size_t from = 0, to = 0, slot = 0; /* the run: values from..to, gradients from slot on */
    float rate = 1;
    int i, part;
    if (d->clip_norm > 0) ckca__op_clip(ctx, m->trained, m->gradients, d->clip_norm, gscale, m->workspace);
    if (!(d->clip_norm > 0)) gscale = NULL;
    for (part = 0; part < 3; part++)
        for (i = 0; i < (part < 2 ? m->parameters : 1); i++) {
            const ckca__parameter *p = &m->parameter[i];
            const int end = part == 2; /* no parameter: ends the last run */
            if (!end && (!ckca__has_momentum(m, p) || (p->role == CKCA__ROLE_WEIGHT) != !part)) continue;
            if (end || to != p->offset || rate != m->node[p->node].rate) {
                const size_t decayed = to < m->decayed ? to : from < m->decayed ? m->decayed : from;
                if (to > from)
                    ckca__op_sgd(ctx, to - from, decayed - from, m->values + from, m->gradients + slot,
                                 m->momentum + slot, lr, rate, d->momentum, d->weight_decay, !d->no_nesterov, gscale);
                if (end) break;
                from = p->offset;
                slot = p->slot;
                rate = m->node[p->node].rate;
            }
            to = p->offset + ckca__round_up(p->count, CKCA__ALIGN / sizeof(float));
        }
    m->folded_valid = 0;
}

/* ---- forward, backward and SGD as public calls ---- */

CKCA_API ckca_status ckca_forward(ckca_model *m, const float *pictures, int n, int training) {
    const int mode = training ? CKCA__MODE_TRAIN | CKCA__MODE_READABLE : CKCA__MODE_EVALUATE;
    ckca__bound bound = {"n", 0, 1, CKCA__BATCH_MAX, 0};
    ckca_status status;
    float *input;
    if (!m) return CKCA_EINVAL;
    if (!pictures) return ckca__null(m->ctx, "ckca_forward", "pictures");
    bound.value = n;
    if ((status = ckca__check_finished(m, "ckca_forward")) ||
        (status = ckca__check_bounds(m->ctx, "ckca_forward", &bound, 1)))
        return status;
    if (training && (status = ckca__check_trained(m, "ckca_forward"))) return status;
    if ((status = ckca__reserve(m, n, mode))) return status;
    if (training && (status = ckca__prepare_frozen(m))) return status;
    input = ckca__input_buffer(m, n, mode);
    ckca__device_upload(m->ctx, input, pictures,
                        (size_t)n * (size_t)m->height * (size_t)m->width * (size_t)m->channels * sizeof(float));
    ckca__run_forward(m, n, mode, input);
    return ckca__device_status(m->ctx);
}

static ckca_status ckca__node_error(const ckca_model *m, const char *call, int node) {
    char nodes[64];
    return ckca__fail(m->ctx, CKCA_EINVAL, "%s: there is no node %d (%s)", call, node,
                      ckca__node_range(m, nodes, sizeof nodes));
}

CKCA_API ckca_status ckca_node_shape(const ckca_model *m, int node, int *height, int *width, int *channels) {
    if (!m) return CKCA_EINVAL;
    if (node < 0 || node >= m->nodes) return ckca__node_error(m, "ckca_node_shape", node);
    if (height) *height = m->node[node].h;
    if (width) *width = m->node[node].w;
    if (channels) *channels = m->node[node].c;
    return CKCA_OK;
}

CKCA_API ckca_status ckca_node_read(ckca_model *m, int node, float *out) {
    size_t values, i;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__check_finished(m, "ckca_node_read"))) return status;
    if (!out) return ckca__null(m->ctx, "ckca_node_read", "out");
    if (node < 0 || node >= m->nodes) return ckca__node_error(m, "ckca_node_read", node);
    if (!m->n)
        return ckca__fail(m->ctx, CKCA_EINVAL,
                          "ckca_node_read: it needs a ckca_forward before it, and no ckca_backward in between, which "
                          "overwrites the outputs");
    if (!(m->mode & CKCA__MODE_READABLE) && node != m->logits && node != m->pooled)
        return ckca__fail(m->ctx, CKCA_EINVAL,
                          "ckca_node_read: node %d (%s) cannot be read: only a ckca_forward with training keeps it; "
                          "without, only the logits (%d) and the features (%d) can be read",
                          node, ckca__kind_name[m->node[node].kind], m->logits, m->pooled);
    if (!ckca__runs(m, node, m->mode))
        return ckca__fail(m->ctx, CKCA_EINVAL,
                          "ckca_node_read: node %d (%s) cannot be read: it is fused into the node that reads it", node,
                          ckca__kind_name[m->node[node].kind]);
    values = ckca__rows(&m->node[node], m->n) * (size_t)m->node[node].c;
    if (m->node[node].bf16) { /* downloaded to the second half of out, then widened from the start */
        const unsigned char *bytes = (unsigned char *)out + 2 * values;
        ckca__device_download(m->ctx, (unsigned char *)out + 2 * values, ckca__value(m, node), 2 * values);
        for (i = 0; i < values; i++) {
            uint16_t upper;
            uint32_t bits;
            memcpy(&upper, bytes + 2 * i, sizeof upper);
            bits = (uint32_t)upper << 16;
            memcpy(&out[i], &bits, sizeof bits);
        }
    } else {
        ckca__device_download(m->ctx, out, ckca__value(m, node), values * sizeof(float));
    }
    return ckca__device_status(m->ctx);
}

CKCA_API ckca_status ckca_backward(ckca_model *m, const float *dlogits, const float *dfeatures) {
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__check_finished(m, "ckca_backward"))) return status;
    if (!dlogits) return ckca__null(m->ctx, "ckca_backward", "dlogits");
    if (!m->n || m->mode != (CKCA__MODE_TRAIN | CKCA__MODE_READABLE))
        return ckca__fail(m->ctx, CKCA_EINVAL,
                          "ckca_backward: every call needs its own ckca_forward with training right before it");
    ckca__clear_has_grad(m);
    ckca__device_upload(m->ctx, ckca__grad(m, m->logits), dlogits, (size_t)m->n * (size_t)m->classes * sizeof(float));
    m->node[m->logits].has_grad = 1;
    if (dfeatures && !m->node[m->pooled].constant) {
        ckca__device_upload(m->ctx, ckca__grad(m, m->pooled), dfeatures,
                            (size_t)m->n * (size_t)m->features * sizeof(float));
        m->node[m->pooled].has_grad = 1;
    }
    ckca__run_backward(m);
    m->n = 0; /* gradients have overwritten the activations, so a second backward must fail */
    return ckca__device_status(m->ctx);
}

CKCA_API ckca_status ckca_zero_gradients(ckca_model *m) {
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__check_finished(m, "ckca_zero_gradients"))) return status;
    if (m->gradients) ckca__device_zero(m->ctx, m->gradients, m->trained * sizeof(float));
    return ckca__device_status(m->ctx);
}

CKCA_API ckca_status ckca_sgd(ckca_model *m, const ckca_sgd_desc *desc) {
    ckca_sgd_desc d;
    ckca_update_desc settings;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__check_finished(m, "ckca_sgd"))) return status;
    if (!desc) return ckca__null(m->ctx, "ckca_sgd", "desc");
    d = *desc;
    memset(&settings, 0, sizeof settings);
    settings.lr = d.lr;
    settings.momentum = d.momentum;
    settings.weight_decay = d.weight_decay;
    settings.clip_norm = d.clip_norm;
    settings.no_nesterov = d.no_nesterov;
    if ((status = ckca__settings_check(m->ctx, "ckca_sgd", &settings))) return status;
    if (!m->gradients || !m->momentum || !m->rate)
        return ckca__fail(m->ctx, CKCA_EINVAL,
                          "ckca_sgd: there are no gradients yet: call ckca_forward with training, then ckca_backward");
    ckca__settings_apply_defaults(&settings);
    ckca__settings_resolve_off(&settings);
    d.momentum = settings.momentum;
    d.weight_decay = settings.weight_decay;
    d.clip_norm = settings.clip_norm;
    ckca__device_upload(m->ctx, m->rate, &d.lr, sizeof d.lr);
    ckca__run_sgd(m, &d, m->rate, m->rate + 1);
    return ckca__device_status(m->ctx);
}

/* ---- tensors ---- */

CKCA_API int ckca_tensor_count(const ckca_model *m) { return m && m->finished ? m->parameters : 0; }

CKCA_API int ckca_tensor_find(const ckca_model *m, const char *name) {
    int i;
    for (i = 0; name && i < ckca_tensor_count(m); i++)
        if (!strcmp(m->parameter[i].name, name)) return i;
    return -1;
}

/* Checks the arguments of a call that takes tensor i and a pointer, whose name is argument. */
static ckca_status ckca__check_tensor(const ckca_model *m, const char *call, int i, const void *memory,
                                      const char *argument) {
    ckca_status status = ckca__check_finished(m, call);
    if (status) return status;
    if (!memory) return ckca__null(m->ctx, call, argument);
    if (i < 0 || i >= m->parameters)
        return ckca__fail(m->ctx, CKCA_EINVAL, "%s: there is no tensor %d (they are 0 to %d)", call, i,
                          m->parameters - 1);
    return CKCA_OK;
}

CKCA_API ckca_status ckca_tensor_info_get(const ckca_model *m, int i, ckca_tensor_info *tensor) {
    const ckca__parameter *p;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__check_tensor(m, "ckca_tensor_info_get", i, tensor, "tensor"))) return status;
    p = &m->parameter[i];
    tensor->name = p->name;
    tensor->dims = p->dims;
    memcpy(tensor->shape, p->shape, sizeof p->shape);
    tensor->count = (int64_t)p->count;
    tensor->trainable = p->role < CKCA__ROLE_MEAN;
    return CKCA_OK;
}

/* Converts between the arenas' K x R x S x C and the files' K x C x R x S; p->count floats, host to host. */
static void ckca__reorder(const ckca__parameter *p, const float *from, float *to, int to_pytorch) {
    const size_t c = (size_t)p->shape[1], area = (size_t)p->shape[2] * (size_t)p->shape[3];
    size_t k, i, j;
    if (p->dims != 4) {
        memcpy(to, from, p->count * sizeof(float));
        return;
    }
    for (k = 0; k < (size_t)p->shape[0]; k++, from += c * area, to += c * area)
        for (i = 0; i < area; i++)
            for (j = 0; j < c; j++) {
                if (to_pytorch)
                    to[j * area + i] = from[i * c + j];
                else
                    to[i * c + j] = from[j * area + i];
            }
}

/* *device: the tensor in the arena of slot. *host: a buffer of p->count floats, which the caller releases. */
static ckca_status ckca__tensor_buffer(ckca_model *m, const char *call, int i, ckca_slot slot, float **device,
                                       float **host) {
    static const char *const slot_name[CKCA_SLOT_COUNT] = {"value", "gradient", "momentum"};
    float *const arenas[CKCA_SLOT_COUNT] = {m->values, m->gradients, m->momentum}, *arena;
    const ckca__parameter *p = &m->parameter[i];
    ckca__bound bound = {"slot", 0, 0, CKCA_SLOT_COUNT - 1, 0};
    ckca_status status;
    bound.value = (int)slot;
    if ((status = ckca__check_bounds(m->ctx, call, &bound, 1))) return status;
    arena = arenas[slot];
    if (slot != CKCA_SLOT_VALUE && p->role >= CKCA__ROLE_MEAN)
        return ckca__fail(m->ctx, CKCA_EINVAL, "%s: %s is a running statistic, it has no %s", call, p->name,
                          slot_name[slot]);
    if (slot != CKCA_SLOT_VALUE && !ckca__has_momentum(m, p))
        return ckca__fail(m->ctx, CKCA_EINVAL, "%s: %s is frozen (ckca_freeze), it has no %s", call, p->name,
                          slot_name[slot]);
    if (!arena)
        return ckca__fail(m->ctx, CKCA_EINVAL,
                          "%s: %s has no %s yet: ckca_forward with training or ckca_update allocates it", call, p->name,
                          slot_name[slot]);
    *host = (float *)ckca__alloc(m->ctx, p->count * sizeof(float));
    if (!*host) return ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for a copy", p->name);
    *device = arena + (slot == CKCA_SLOT_VALUE ? p->offset : p->slot);
    return CKCA_OK;
}

CKCA_API ckca_status ckca_tensor_read(ckca_model *m, int i, ckca_slot slot, float *out) {
    float *host, *device;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__check_tensor(m, "ckca_tensor_read", i, out, "out")) ||
        (status = ckca__tensor_buffer(m, "ckca_tensor_read", i, slot, &device, &host)))
        return status;
    ckca__device_download(m->ctx, host, device, m->parameter[i].count * sizeof(float));
    ckca__reorder(&m->parameter[i], host, out, 1);
    ckca__release(m->ctx, host);
    return ckca__device_status(m->ctx);
}

CKCA_API ckca_status ckca_tensor_write(ckca_model *m, int i, ckca_slot slot, const float *in) {
    float *host, *device;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if ((status = ckca__check_tensor(m, "ckca_tensor_write", i, in, "in")) ||
        (status = ckca__tensor_buffer(m, "ckca_tensor_write", i, slot, &device, &host)))
        return status;
    ckca__reorder(&m->parameter[i], in, host, 0);
    ckca__device_upload(m->ctx, device, host, m->parameter[i].count * sizeof(float));
    ckca__release(m->ctx, host);
    m->folded_valid = m->frozen_valid = 0;
    return ckca__device_status(m->ctx);
}

/* ===================================================================================================================
   RANKS                                                                                                       >>ranks

   Several processes (ckca_ranks): all ranks come to the same collective operations in the same order. What may fail on
   one rank alone is followed by ckca__ranks_agree before the next collective operation, so that no rank waits for one
   that has given up. With one process nothing here does anything.

   Of a batch, ckca__part gives each rank its pictures, so a rank may have none: it then takes part in the sums with
   gradients of zero. A term of the loss that is a mean over the pictures of the rank's part needs no more, since each
   rank's gradient is weighted with its share of the batch. Numbers that a term needs from all pictures (counts, class
   means) must be the same on all ranks before they are used: ckca__ranks_sum_counts for integers, ckca__device_ranks_sum
   with share 1 and ckca__device_ranks_wait for floats on the device (weight means by their counts first), the sums of
   ckca__ranks_agree_on for a few doubles. All ranks must make the call, and what they compute from it is then bitwise
   the same everywhere.
   =================================================================================================================== */

/* Gradients are summed as soon as this many are ready (1 MiB): one bucket. Layers are not divided. */
#ifndef CKCA__BUCKET /* tests make it smaller */
#define CKCA__BUCKET ((size_t)1 << 18)
#endif
enum { CKCA__RANKS_SUMS = 5, CKCA__RANKS_TEXT = 256 };

/* What a rank tells the others. */
typedef struct ckca__ranks_record {
    uint32_t status, call; /* call: a hash of its name */
    double sums[CKCA__RANKS_SUMS];
} ckca__ranks_record;

static const char ckca__ranks_lost[] = "the connection of the ranks is broken";

/* The first of n pictures that rank takes of a batch; the part of rank - 1 ends there. Rank 0 has the largest part. */
static int ckca__part(const ckca_context *ctx, int n, int rank) {
    return (int)(((int64_t)n * rank + ctx->ranks.size - 1) / ctx->ranks.size);
}

/* Collects bytes[0..size) of every rank into all, rank by rank: each rank adds its bytes, two to a float, to the others'
   zeros, which is exact. size: even, up to CKCA__RANKS_TEXT. 0: the connection is broken. */
static int ckca__ranks_gather(ckca_context *ctx, const void *bytes, size_t size, void *all) {
    const ckca_ranks *r = &ctx->ranks;
    const size_t halves = size / 2, count = halves * (size_t)r->size;
    size_t i;
    if (ctx->ranks_broken) return 0;
    for (i = 0; i < count; i++) ctx->exchange[i] = 0;
    for (i = 0; i < halves; i++) {
        uint16_t half;
        memcpy(&half, (const char *)bytes + 2 * i, sizeof half);
        ctx->exchange[halves * (size_t)r->rank + i] = half;
    }
    ctx->ranks_broken = r->sum_start(ctx->exchange, count, r->user) || r->sum_wait(r->user);
    if (ctx->ranks_broken) return 0;
    for (i = 0; i < count; i++) {
        const uint16_t half = (uint16_t)ctx->exchange[i];
        memcpy((char *)all + 2 * i, &half, sizeof half);
    }
    return 1;
}

/* Fails on all ranks if status is a failure on one of them: with the status of the lowest such rank, and its sentence.
   Otherwise adds up sums[0..CKCA__RANKS_SUMS) (or NULL) over ranks, in their order. call: the ranks must be in the same
   public call. */
static ckca_status ckca__ranks_agree_on(ckca_context *ctx, const char *call, ckca_status status, double *sums) {
    ckca__ranks_record mine, *all;
    char text[CKCA__RANKS_TEXT], *texts;
    const int size = ctx->ranks.size;
    int i, k, failing = -1, differs = -1;
    const char *name;
    if (size < 2 || (status && ctx->agreed)) return status;
    memset(&mine, 0, sizeof mine);
    mine.status = (uint32_t)status;
    for (name = call; *name; name++) mine.call = mine.call * 31 + (unsigned char)*name;
    if (sums) memcpy(mine.sums, sums, sizeof mine.sums);
    /* The lower half of exchange is for the sum, the upper one for what it brings. */
    texts = (char *)(ctx->exchange + (size_t)size * CKCA__RANKS_TEXT / 2);
    all = (ckca__ranks_record *)(void *)texts;
    ctx->agreed = 1;
    if (!ckca__ranks_gather(ctx, &mine, sizeof mine, all))
        return status ? status
                      : ckca__fail(ctx, CKCA_ERANKS, "rank %d of %d: %s", ctx->ranks.rank, size, ckca__ranks_lost);
    for (i = size - 1; i >= 0; i--) {
        if (all[i].status) failing = i;
        if (all[i].call != all[0].call) differs = i;
    }
    if (failing < 0 && differs < 0) {
        for (k = 0; sums && k < CKCA__RANKS_SUMS; k++)
            for (sums[k] = i = 0; i < size; i++) sums[k] += all[i].sums[k];
        ctx->agreed = 0;
        return CKCA_OK;
    }
    if (failing >= 0) status = (ckca_status)all[failing].status;
    memset(text, 0, sizeof text);
    snprintf(text, sizeof text, "%.255s", failing >= 0 ? ctx->error : call);
    if (!ckca__ranks_gather(ctx, text, sizeof text, texts))
        return ckca__fail(ctx, CKCA_ERANKS, "rank %d of %d: %s", ctx->ranks.rank, size, ckca__ranks_lost);
    if (failing >= 0)
        return ckca__fail(ctx, status, "rank %d of %d: %s", failing, size, texts + (size_t)failing * sizeof text);
    return ckca__fail(ctx, CKCA_ERANKS, "rank %d of %d: it is in %s, rank 0 in %s: all must make the same calls",
                      differs, size, texts + (size_t)differs * sizeof text, texts);
}

static ckca_status ckca__ranks_agree(ckca_context *ctx, const char *call, ckca_status status) {
    return ckca__ranks_agree_on(ctx, call, status, NULL);
}

/* Collects 8 bytes of every rank into *all; *other: the first rank whose bytes are not rank 0's, 0: there is none. A
   caller that finds one fails on all ranks. */
static ckca_status ckca__ranks_compare(ckca_context *ctx, const char *call, const void *mine, const void **all,
                                       int *other) {
    const unsigned char *first = (unsigned char *)(ctx->exchange + (size_t)ctx->ranks.size * CKCA__RANKS_TEXT / 2);
    ckca_status status = ckca__ranks_agree(ctx, call, CKCA_OK);
    *other = 0;
    if (ctx->ranks.size < 2 || status) return status;
    *all = first;
    ctx->agreed = 1;
    if (!ckca__ranks_gather(ctx, mine, 8, (void *)(ctx->exchange + (size_t)ctx->ranks.size * CKCA__RANKS_TEXT / 2)))
        return ckca__fail(ctx, CKCA_ERANKS, "rank %d of %d: %s", ctx->ranks.rank, ctx->ranks.size, ckca__ranks_lost);
    while (++*other < ctx->ranks.size)
        if (memcmp(first + 8 * (size_t)*other, first, 8)) return CKCA_OK;
    *other = ctx->agreed = 0;
    return CKCA_OK;
}

/* Fails on all ranks if value is not the same on all; what: "pictures", ... */
static ckca_status ckca__ranks_same(ckca_context *ctx, const char *call, const char *what, uint64_t value) {
    const void *all;
    int other;
    ckca_status status = ckca__ranks_compare(ctx, call, &value, &all, &other);
    if (status || !other) return status;
    return ckca__fail(ctx, CKCA_ERANKS, "rank %d of %d: %s: its %s differ from rank 0's", other, ctx->ranks.size, call,
                      what);
}

/* The same for a number, which the sentence shows. */
static ckca_status ckca__ranks_same_number(ckca_context *ctx, const char *call, const char *what, double value) {
    const void *all;
    double theirs, first;
    int other;
    ckca_status status = ckca__ranks_compare(ctx, call, &value, &all, &other);
    if (status || !other) return status;
    memcpy(&first, all, sizeof first);
    memcpy(&theirs, (const unsigned char *)all + 8 * (size_t)other, sizeof theirs);
    return ckca__fail(ctx, CKCA_ERANKS, "rank %d of %d: %s: its %s is %.9g, rank 0's is %.9g", other, ctx->ranks.size,
                      call, what, theirs, first);
}

/* Adds up values[0..n) over ranks, to float's precision. Call ckca__ranks_agree before. */
static ckca_status ckca__ranks_sum_values(ckca_context *ctx, const char *call, double *values, size_t n) {
    float *sums;
    size_t i;
    ckca_status status = CKCA_OK;
    if (ctx->ranks.size < 2) return CKCA_OK;
    sums = (float *)ckca__alloc(ctx, ckca__mul(n, sizeof *sums));
    if (!sums) status = ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for %.0f sums of all ranks", call, (double)n);
    if (!(status = ckca__ranks_agree(ctx, call, status))) {
        for (i = 0; i < n; i++) sums[i] = (float)values[i];
        ctx->ranks_broken = ctx->ranks.sum_start(sums, n, ctx->ranks.user) || ctx->ranks.sum_wait(ctx->ranks.user);
        for (i = 0; !ctx->ranks_broken && i < n; i++) values[i] = (double)sums[i];
        if (ctx->ranks_broken) status = ckca__fail(ctx, CKCA_ERANKS, "%s: %s", call, ckca__ranks_lost);
    }
    ckca__release(ctx, sums);
    return status;
}

/* Adds up counts[0..n) (0 to INT_MAX on each rank) over ranks, exactly: 11 bits to a float. Call ckca__ranks_agree
   before. A sum over INT_MAX is INT_MAX. */
static ckca_status ckca__ranks_sum_counts(ckca_context *ctx, const char *call, int *counts, int n) {
    const size_t values = ckca__mul((size_t)n, 3 * sizeof(float));
    float *pieces;
    int i;
    ckca_status status;
    if (ctx->ranks.size < 2) return CKCA_OK;
    pieces = (float *)ckca__alloc(ctx, values);
    status = pieces ? CKCA_OK : ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for %d counts of all ranks", call, n);
    if ((status = ckca__ranks_agree(ctx, call, status))) {
        ckca__release(ctx, pieces);
        return status;
    }
    for (i = 0; i < n; i++) {
        pieces[3 * (size_t)i] = (float)(counts[i] & 2047);
        pieces[3 * (size_t)i + 1] = (float)(counts[i] >> 11 & 2047);
        pieces[3 * (size_t)i + 2] = (float)(counts[i] >> 22);
    }
    ctx->ranks_broken =
        ctx->ranks.sum_start(pieces, 3 * (size_t)n, ctx->ranks.user) || ctx->ranks.sum_wait(ctx->ranks.user);
    for (i = 0; !ctx->ranks_broken && i < n; i++) {
        const float *p = pieces + 3 * (size_t)i;
        const double sum = (double)p[0] + 2048.0 * (double)p[1] + 4194304.0 * (double)p[2];
        counts[i] = sum < (double)INT_MAX ? (int)sum : INT_MAX;
    }
    ckca__release(ctx, pieces);
    return ctx->ranks_broken ? ckca__fail(ctx, CKCA_ERANKS, "%s: %s", call, ckca__ranks_lost) : CKCA_OK;
}

/* Rank 0's values[0..count) of device memory on all ranks. Call ckca__ranks_agree before. */
static ckca_status ckca__ranks_copy(ckca_context *ctx, const char *call, float *values, size_t count) {
    float *host = (float *)ckca__alloc(ctx, ckca__mul(count, sizeof(float)));
    ckca_status status = CKCA_OK;
    if (!host)
        status = ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for %.1f MB of weights", call, (double)count * 4e-6);
    if (!status) {
        ckca__device_download(ctx, host, values, count * sizeof(float));
        status = ckca__device_status(ctx);
    }
    if (!(status = ckca__ranks_agree(ctx, call, status)) && count) {
        ctx->ranks_broken = ctx->ranks.broadcast(host, count * sizeof(float), ctx->ranks.user) != 0;
        if (ctx->ranks_broken)
            status = ckca__fail(ctx, CKCA_ERANKS, "%s: %s", call, ckca__ranks_lost);
        else if (ctx->ranks.rank)
            ckca__device_upload(ctx, values, host, count * sizeof(float));
    }
    ckca__release(ctx, host);
    return status;
}

/* The end of ckca_init: the memory for the exchange; all ranks must run the same program on the same kind of device. */
static ckca_status ckca__ranks_init(ckca_context *ctx, ckca_status status) {
    static const char compiler[] =
#ifdef __VERSION__
        __VERSION__;
#else
        "";
#endif
    const size_t size = (size_t)ctx->ranks.size;
    uint64_t version = 0, compiled = 0;
    const char *c;
    if (size < 2) return status;
    /* Without this block a rank could not tell the others: the transport's end of this process does. */
    ctx->exchange = (float *)ckca__alloc(ctx, size * CKCA__RANKS_TEXT * sizeof(float));
    if (!ctx->exchange) {
        ctx->ranks_broken = 1;
        return ckca__fail(ctx, CKCA_ENOMEM, "ckca_init: out of memory for the messages of %d ranks", ctx->ranks.size);
    }
    for (c = CKCA_VERSION; *c; c++) version = version * 31 + (unsigned char)*c;
    for (c = compiler; *c; c++) compiled = compiled * 31 + (unsigned char)*c;
    if ((status = ckca__ranks_agree(ctx, "ckca_init", status)) ||
        (status = ckca__ranks_same_number(ctx, "ckca_init", "number of ranks", ctx->ranks.size)) ||
        (status = ckca__ranks_same(ctx, "ckca_init", "ckca.h versions", version)) ||
        (status = ckca__ranks_same(ctx, "ckca_init", "compilers", compiled)) ||
        (status = ckca__ranks_same_number(ctx, "ckca_init", "device (0: host, 1: GPU)", !CKCA__DEVICE_IS_HOST)) ||
        (status = ckca__ranks_same_number(ctx, "ckca_init", "isa (see ckca_isa)", (double)ctx->isa)) ||
        (status = ckca__ranks_same_number(ctx, "ckca_init", "no_winograd", ctx->no_winograd)) ||
        (status = ckca__ranks_same_number(ctx, "ckca_init", "precision", (double)ctx->precision)))
        return status;
    return ckca__ranks_agree(ctx, "ckca_init", ckca__device_ranks_init(ctx));
}

/* In the backward pass, after node i: the gradients of weights of node i and later ones are final. Starts their sum over
   ranks if they fill a bucket, and all that is left after the first node. */
static void ckca__sum_bucket(ckca_model *m, int i) {
    const ckca__node *x = &m->node[i];
    size_t from = m->summed_from;
    if (x->tensor >= 0 && m->parameter[x->tensor].role == CKCA__ROLE_WEIGHT && x->rate > 0)
        from = m->parameter[x->tensor].slot;
    if (i == 1) from = 0;
    if (m->summed_from - from >= CKCA__BUCKET || (i == 1 && m->summed_from > 0)) {
        ckca__device_ranks_sum(m->ctx, m->summed_from - from, m->share, m->gradients + from);
        m->summed_from = from;
    }
    if (i == 1 && m->trained > m->trained_decayed) /* biases, and weights without decay: together they are small */
        ckca__device_ranks_sum(m->ctx, m->trained - m->trained_decayed, m->share, m->gradients + m->trained_decayed);
    ckca__device_ranks_poll(m->ctx);
}

/* The same sums without a backward pass. */
static void ckca__sum_gradients(ckca_model *m, float share) {
    int i;
    m->share = share;
    m->summed_from = m->trained_decayed;
    for (i = m->nodes - 1; i > 0; i--) ckca__sum_bucket(m, i);
    ckca__device_ranks_wait(m->ctx);
}

CKCA_API ckca_status ckca_sum_gradients(ckca_model *m, float share) {
    ckca__bound bound = {"share", 0, 0, 1, 0};
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    m->ctx->agreed = 0;
    bound.value = (double)share;
    status = ckca__check_finished(m, "ckca_sum_gradients");
    if (!status) status = ckca__check_bounds(m->ctx, "ckca_sum_gradients", &bound, 1);
    if (!status && !m->gradients)
        status = ckca__fail(m->ctx, CKCA_EINVAL,
                            "ckca_sum_gradients: there are no gradients yet: call ckca_forward with "
                            "training first");
    if ((status = ckca__ranks_agree(m->ctx, "ckca_sum_gradients", status)) || m->ctx->ranks.size < 2) return status;
    if ((status = ckca__ranks_same_number(m->ctx, "ckca_sum_gradients", "number of values", (double)m->trained)))
        return status;
    ckca__sum_gradients(m, share);
    if (m->ctx->ranks_broken) return ckca__fail(m->ctx, CKCA_ERANKS, "ckca_sum_gradients: %s", ckca__ranks_lost);
    return ckca__device_status(m->ctx);
}

/* ===================================================================================================================
   MEMORY PLAN                                                                                                  >>plan

   How much memory a model takes, and at which offset each value and gradient is.

   A buffer is live from the moment that writes it to the last moment that reads it. Buffers that are never live at the
   same time may share memory. In an SGD step, node i runs forward at moment i and backward at moment 2 nodes - 1 - i. All
   sizes are per picture, so one plan serves every batch size.

   Backward reads mostly the input of each batch norm and, for the weight gradient of the convolution after it, its
   output. That output is not kept: backward recomputes it from the input and, where there is one, the residual, which
   may itself have to be recomputed, back to the first block of the stage. This costs one pass over memory with little
   arithmetic and nearly halves the activations. An intermediate result of this is kept until its own reader needs it,
   unless that would raise the peak; then it is recomputed a second time.

   If the only reader of a batch norm can normalise while reading (see ckca__is_fused_into_reader), the output is never
   written: the reader reads the batch norm's input and normalises in registers.

   Worked example: four nodes on pictures of 8 x 8 x 16. Node 0 is the pictures, 1 a convolution to 16 channels, 2 global
   average pooling, 3 the logits. Forward takes moments 0 to 3, backward 4 to 7 (node 3 at 4, node 1 at 6).

       buffer        floats   written at   last read at                                offset
       value 0         1024   0            6, by the convolution's weight gradient     0
       value 1         1024   1            2, by the pooling                           1024
       gradient 1      1024   5            6                                           1024: value 1 is dead
       value 2           16   2            4, by the logits' weight gradient           2048
       gradient 2        16   4            5                                           2064
       value 3           16   3            4, by the loss                              1024: value 1 is dead
       gradient 3        16   4            4                                           1040

   The plan takes 2080 floats per picture instead of 3120. ckca__plan_offsets assigns offsets to the largest buffers
   first, each the lowest that is free while the buffer is live.
   =================================================================================================================== */

typedef struct ckca__buffer {
    size_t size, *offset;    /* in floats per picture; *offset: where the plan writes the offset */
    int first_use, last_use; /* moments */
} ckca__buffer;

typedef struct ckca__planner {
    ckca_model *m;
    int mode, end;      /* moments are 0 to end - 1 */
    size_t *live, peak; /* live floats per picture at each moment, and their maximum */
    /* One value per node: */
    int *last_reader; /* the last node that reads it in the forward pass; -1: none */
    int *grad_at;     /* where its gradient is: with that of node grad_at or, if negative, over the value of ~grad_at */
    int *first_read;  /* the first moment at which backward itself reads it; end: never */
    int *last_read;   /* the last moment at which backward reads it, also to recompute others; -1: never */
    int *last_item;   /* its last item in the list of recomputations, or one of the values below */
} ckca__planner;

enum { CKCA__ITEM_NONE = -1, CKCA__ITEM_KEPT = -2 }; /* not recomputed so far; kept from the forward pass */

/* Below: */
static int ckca__reserve_zeroed(const ckca_model *m, float **arena);
static int ckca__has_folded(const ckca_model *m);
static ckca_status ckca__measure(const ckca_model *m, int n, int mode, ckca_bytes *bytes);
static size_t ckca__all_packed_bytes(const ckca_model *m, int mode);
static size_t ckca__workspace_bytes(const ckca_model *m, int n, int mode);
static ckca_status ckca__plan(ckca_model *m, int mode);
static void ckca__plan_gradients(ckca__planner *p);
static int ckca__plan_grad_last_use(const ckca__planner *p, int grad_at);
static void ckca__plan_backward(ckca__planner *p);
static int ckca__plan_recompute(ckca__planner *p, int i, int j, int intermediate, int *failed);
static void ckca__plan_add_buffer(ckca__planner *p, ckca__buffer *b, size_t size, size_t *offset, int first_use,
                                  int last_use);
static size_t ckca__plan_offsets(ckca__buffer *list, int count);
static int ckca__largest_first(const void *a, const void *b);
static size_t ckca__plan_peak(const ckca__planner *p, int first_use, int last_use, size_t size);
static void ckca__plan_add_live(ckca__planner *p, int first_use, int last_use, size_t size);
static void ckca__plan_note_read(ckca__planner *p, int i, int moment);
static size_t ckca__node_floats(const ckca__node *x);

/* ---- arenas ---- */

/* Allocates memory for n pictures in a mode, so that no forward, backward or SGD step allocates any. */
static ckca_status ckca__reserve(ckca_model *m, int n, int mode) {
    ckca_bytes bytes;
    ckca_status status;
    void *activations = m->activations;
    size_t packed;
    int ok = 1;
    if (!m->plan_values[mode] && (status = ckca__plan(m, mode))) return status;
    if ((status = ckca__measure(m, n, mode, &bytes))) return status;
    if ((mode & CKCA__MODE_TRAIN) && !m->recompute_outputs && bytes.activations > m->activation_bytes &&
        bytes.activations > (ckca__device_free_bytes(m->ctx) + m->activation_bytes) / 2) { /* memory is short */
        int other;
        m->recompute_outputs = 1;
        for (other = 0; other < CKCA__MODES; other++)
            if (other & CKCA__MODE_TRAIN) m->plan_values[other] = 0;
        ckca__device_release(m->ctx, activations, m->activation_bytes); /* no pass continues with the old plan */
        activations = m->activations = NULL;
        m->activation_bytes = 0;
        m->n = 0;
        if ((status = ckca__plan(m, mode)) || (status = ckca__measure(m, n, mode, &bytes))) return status;
    }
    if (activations && m->activation_bytes < bytes.activations) m->n = 0; /* the outputs in it are lost */
    ok = ckca__arena(m->ctx, &activations, &m->activation_bytes, bytes.activations);
    m->activations = (float *)activations;
    packed = ckca__all_packed_bytes(m, mode);
    ok = ok && ckca__arena(m->ctx, &m->workspace, &m->workspace_bytes, bytes.workspace - packed);
    if (packed > m->packed_bytes) {
        m->folded_valid = 0; /* the packed weights are lost */
        ok = ok && ckca__arena(m->ctx, &m->packed_weights, &m->packed_bytes, packed);
    }
    if (ok && !m->saved && m->saved_count)
        ok = (m->saved = (float *)ckca__device_alloc(m->ctx, m->saved_count * sizeof(float))) != NULL;
    if (ok && !m->folded && (!(mode & CKCA__MODE_TRAIN) || ckca__has_folded(m))) {
        ok = (m->folded = (float *)ckca__device_alloc(m->ctx, m->trainable * sizeof(float))) != NULL;
        m->folded_valid = m->frozen_valid = 0;
    }
    if (ok && (mode & CKCA__MODE_TRAIN)) {
        ok = ckca__reserve_zeroed(m, &m->gradients) && ckca__reserve_zeroed(m, &m->momentum);
        if (ok && !m->rate) ok = (m->rate = (float *)ckca__device_alloc(m->ctx, 2 * sizeof *m->rate)) != NULL;
    }
    if (!ok)
        return ckca__fail(m->ctx, CKCA_ENOMEM, "out of memory: a batch of %d pictures of %d x %d x %d needs %.1f MB", n,
                          m->height, m->width, m->channels, (double)bytes.total * 1e-6);
    return CKCA_OK;
}

/* 1 if training runs convolutions folded, as in evaluation. */
static int ckca__has_folded(const ckca_model *m) {
    int i;
    for (i = 0; i < m->nodes; i++)
        if (m->node[i].evaluates) return 1;
    return 0;
}

/* Makes *arena hold at least bytes; a new one does not keep the contents. Returns 0 if out of memory. */
static int ckca__arena(ckca_context *ctx, void **arena, size_t *capacity, size_t bytes) {
    if (*arena && *capacity >= bytes) return 1;
    ckca__device_release(ctx, *arena, *capacity);
    *capacity = 0;
    *arena = ckca__device_alloc(ctx, bytes);
    if (*arena) *capacity = bytes;
    return *arena != NULL;
}

/* Allocates gradients or momentum, as zeros, if there are none yet. Returns 0 if out of memory. */
static int ckca__reserve_zeroed(const ckca_model *m, float **arena) {
    const size_t bytes = m->trained * sizeof(float);
    if (*arena) return 1;
    *arena = (float *)ckca__device_alloc(m->ctx, bytes);
    if (*arena) ckca__device_zero(m->ctx, *arena, bytes);
    return *arena != NULL;
}

/* Bytes that a model needs in a mode for n pictures, beside its weights: ckca__measure for any mode. */
static ckca_status ckca__mode_bytes(const ckca_model *model, int n, int mode, size_t *bytes) {
    ckca_model *m = (ckca_model *)(uintptr_t)model; /* planning sets offsets, which no caller can see */
    ckca_bytes measured;
    ckca_status status = CKCA_OK;
    if (!m->plan_values[mode]) status = ckca__plan(m, mode);
    if (!status) status = ckca__measure(m, n, mode, &measured);
    if (!status) *bytes = measured.total - m->all * sizeof(float);
    return status;
}

CKCA_API ckca_status ckca_model_bytes(const ckca_model *model, int batch, int training, ckca_bytes *bytes) {
    ckca_model *m = (ckca_model *)(uintptr_t)model; /* planning sets offsets, which no caller can see */
    ckca__bound bound = {"batch", 0, 1, CKCA__BATCH_MAX, 0};
    ckca_status status;
    int mode = training ? CKCA__MODE_TRAIN : CKCA__MODE_EVALUATE;
    if (!m) return CKCA_EINVAL;
    if (!bytes) return ckca__null(m->ctx, "ckca_model_bytes", "bytes");
    bound.value = batch;
    if ((status = ckca__check_finished(m, "ckca_model_bytes")) ||
        (status = ckca__check_bounds(m->ctx, "ckca_model_bytes", &bound, 1)))
        return status;
    if (!m->plan_values[mode] && (status = ckca__plan(m, mode))) return status;
    return ckca__measure(m, batch, mode, bytes);
}

/* The memory that n pictures take in a mode that has a plan. */
static ckca_status ckca__measure(const ckca_model *m, int n, int mode, ckca_bytes *bytes) {
    memset(bytes, 0, sizeof *bytes);
    bytes->parameters = m->all * sizeof(float);
    if (mode & CKCA__MODE_TRAIN) bytes->gradients = bytes->momentum = m->trained * sizeof(float);
    if (!(mode & CKCA__MODE_TRAIN) || ckca__has_folded(m))
        bytes->parameters += m->trainable * sizeof(float); /* folded */
    bytes->parameters += m->saved_count * sizeof(float);
    bytes->activations = ckca__mul(ckca__mul((size_t)n, m->plan_values[mode]), sizeof(float));
    bytes->workspace = ckca__sum(ckca__workspace_bytes(m, n, mode), ckca__all_packed_bytes(m, mode));
    bytes->total = ckca__sum(ckca__sum(bytes->parameters, bytes->gradients + bytes->momentum),
                             ckca__sum(bytes->activations, bytes->workspace));
    if (bytes->total > SIZE_MAX / 2)
        return ckca__fail(m->ctx, CKCA_ENOMEM,
                          "a batch of %d pictures of %d x %d needs more memory than can be addressed", n, m->height,
                          m->width);
    return CKCA_OK;
}

/* Bytes of the packed weights of all convolutions. */
static size_t ckca__all_packed_bytes(const ckca_model *m, int mode) {
    size_t bytes = 0;
    int i;
    for (i = 1; i < m->nodes; i++) {
        ckca__conv s;
        if (!ckca__has_flag(m, i, CKCA__LAYER_CONVOLUTION)) continue;
        ckca__shape(m, &m->node[i], 1, mode, &s);
        bytes = ckca__sum(bytes, ckca__packed_bytes(m->ctx, &s, ckca__trains(m, i, mode)));
    }
    return bytes;
}

/* Bytes of scratch memory that the most demanding op needs. */
static size_t ckca__workspace_bytes(const ckca_model *m, int n, int mode) {
    size_t most = 0, bytes;
    int i;
    for (i = 0; i < m->nodes; i++) {
        bytes = ckca__layers[m->node[i].kind].workspace(m, &m->node[i], n, mode);
        if (most < bytes) most = bytes;
    }
    bytes = ckca__op_workspace(m->ctx, m->trainable, 1); /* clipping */
    return most < bytes ? bytes : most;
}

/* ---- the planner ---- */

/* Plans a mode: lists all buffers with their first and last use, then the recomputations, then assigns offsets. */
static ckca_status ckca__plan(ckca_model *m, int mode) {
    const int training = mode & CKCA__MODE_TRAIN, end = 2 * m->nodes;
    ckca__planner planner, *p = &planner;
    size_t bytes = (size_t)m->nodes * (3 * sizeof(ckca__buffer) + 2 * sizeof(size_t) + 5 * sizeof(int));
    ckca__buffer *list, *all;
    int i, count = 0, failed = 0;
    list = (ckca__buffer *)ckca__alloc(m->ctx, bytes);
    if (!list) return ckca__fail(m->ctx, CKCA_ENOMEM, "out of memory for the plan of %d nodes", m->nodes);
    p->m = m;
    p->mode = mode;
    p->end = end;
    p->peak = 0;
    p->live = (size_t *)(list + 3 * m->nodes);
    p->first_read = (int *)(p->live + end);
    p->last_read = p->first_read + m->nodes;
    p->last_item = p->last_read + m->nodes;
    p->last_reader = p->last_item + m->nodes;
    p->grad_at = p->last_reader + m->nodes;
    m->recomputes[mode] = 0;
    for (i = 0; i < m->nodes; i++) {
        ckca__node *x = &m->node[i];
        x->fused_into_reader[mode] = ckca__is_fused_into_reader(m, i, mode);
        p->last_reader[i] = -1;
        x->takes = 0; /* a tail comes after its convolution */
        if (!x->fused && x->head >= 0 && ckca__has_flag(m, x->source, CKCA__LAYER_CONVOLUTION) &&
            !m->node[x->source].takes) {
            ckca__conv s;
            ckca__shape(m, &m->node[x->source], 1, mode, &s);
            if (m->node[x->head].rate > 0 && ckca__may_take_statistics(m->ctx, &s)) m->node[x->source].takes = i;
        }
        if (!ckca__runs(m, i, mode)) continue;
        if (i) p->last_reader[ckca__stored_node(m, x->source, mode, NULL)] = i;
        if (x->residual >= 0) p->last_reader[ckca__stored_node(m, x->residual, mode, NULL)] = i;
        /* As in evaluation, a batch norm's tail may run the folded convolution too. */
        if (i) {
            const ckca__node *source = &m->node[x->source];
            p->last_reader[!source->folded || ckca__runs(m, x->source, mode) ? x->source : source->in[0]] = i;
        }
        if (x->residual >= 0) p->last_reader[x->residual] = i;
    }
    if (training) {
        ckca__plan_backward(p);
        ckca__plan_gradients(p);
    }
    for (i = 0; i < m->nodes; i++) {
        ckca__node *x = &m->node[i];
        const size_t size = ckca__node_floats(x);
        const int output = ckca__is_output(m, i, mode);
        int last_use = p->last_reader[i] > i ? p->last_reader[i] : i;
        if (!ckca__runs(m, i, mode)) continue;
        if (output || (mode & CKCA__MODE_READABLE)) last_use = m->nodes;
        if (training && p->last_item[i] == CKCA__ITEM_KEPT && last_use < p->last_read[i]) last_use = p->last_read[i];
        if (training && i > 0 && p->grad_at[i] == ~i) last_use = ckca__plan_grad_last_use(p, ~i);
        if (!x->fused_into_reader[mode]) ckca__plan_add_buffer(p, &list[count++], size, &x->value[mode], i, last_use);
        if (training && i > 0 && !x->constant && p->grad_at[i] == i)
            ckca__plan_add_buffer(p, &list[count++], size, &x->grad[mode],
                                  output || p->last_reader[i] < 0 ? m->nodes : end - 1 - p->last_reader[i],
                                  ckca__plan_grad_last_use(p, i));
        if (ckca__trains(m, i, mode) && ckca__layer_of(m, i)->side)
            ckca__plan_add_buffer(p, &list[count++],
                                  ckca__round_up(ckca__layer_of(m, i)->side(x), CKCA__ALIGN / sizeof(float)),
                                  &x->side[mode], i, end - 1 - i);
    }
    for (i = m->nodes - 1; training && i > 0; i--) { /* in the order of the backward pass */
        const ckca__node *x = &m->node[i];
        if (x->fused || x->constant) continue;
        if (ckca__layer_of(m, i)->flags & CKCA__LAYER_READS_INPUT)
            ckca__plan_recompute(p, ckca__stored_node(m, x->source, mode, NULL), i, 0, &failed);
        if (ckca__reads_output(m, i)) ckca__plan_recompute(p, i, i, 0, &failed);
    }
    all = failed ? NULL : (ckca__buffer *)ckca__alloc(m->ctx, (size_t)(count + m->recomputes[mode]) * sizeof *all);
    if (!all) {
        ckca__release(m->ctx, list);
        return ckca__fail(m->ctx, CKCA_ENOMEM, "out of memory for the plan of %d nodes", m->nodes);
    }
    memcpy(all, list, (size_t)count * sizeof *all);
    for (i = 0; i < m->recomputes[mode]; i++) {
        ckca__recompute *item = &m->recompute[mode][i];
        if (item->buffer_of != i) continue;
        all[count].size = ckca__node_floats(&m->node[item->node]);
        all[count].offset = &item->offset;
        all[count].first_use = end - 1 - item->before;
        all[count++].last_use = item->buffer_end;
    }
    m->plan_values[mode] = ckca__plan_offsets(all, count);
    for (i = 0; i < m->recomputes[mode]; i++)
        m->recompute[mode][i].offset = m->recompute[mode][m->recompute[mode][i].buffer_of].offset;
    for (i = 1; training && i < m->nodes; i++) {
        ckca__node *x = &m->node[i];
        x->grad[mode] = p->grad_at[i] < 0 ? m->node[~p->grad_at[i]].value[mode] : m->node[p->grad_at[i]].grad[mode];
    }
    ckca__release(m->ctx, all);
    ckca__release(m->ctx, list);
    return CKCA_OK;
}

/* Finds the gradients that need no buffer of their own: a batch norm's backward overwrites x with dx if no other node
   reads x; it may then overwrite dy with the residual's gradient, if that is the first value of it. */
static void ckca__plan_gradients(ckca__planner *p) {
    const ckca_model *m = p->m;
    int i;
    for (i = 0; i < m->nodes; i++) p->grad_at[i] = i;
    for (i = m->nodes - 1; i > 0; i--) {
        const ckca__node *x = &m->node[i];
        if (!ckca__in_place(m, i) || m->node[x->source].constant) continue;
        p->grad_at[x->source] = ~x->source;
        if (x->residual > 0 && !m->node[x->residual].constant && p->last_reader[x->residual] == i &&
            !ckca__is_output(m, x->residual, p->mode))
            p->grad_at[x->residual] = p->grad_at[i];
    }
}

/* The last use of the gradients at grad_at: the backward of the first node among those that share it. */
static int ckca__plan_grad_last_use(const ckca__planner *p, int grad_at) {
    int i = 1;
    while (p->grad_at[i] != grad_at) i++;
    return p->end - 1 - i;
}

/* Finds which nodes' outputs backward reads and when, and which of them are kept rather than recomputed. */
static void ckca__plan_backward(ckca__planner *p) {
    const ckca_model *m = p->m;
    int i, side, last = 0;
    for (i = 0; i < m->nodes; i++) {
        p->first_read[i] = p->end;
        p->last_read[i] = -1;
        p->last_item[i] = CKCA__ITEM_NONE;
        if (ckca__has_flag(m, i, CKCA__LAYER_CONVOLUTION)) last = i;
    }
    for (i = m->nodes - 1; i > 0; i--) {
        const ckca__node *x = &m->node[i];
        const int moment = p->end - 1 - i;
        if (x->fused || x->constant) continue;
        if (ckca__layer_of(m, i)->flags & CKCA__LAYER_READS_INPUT)
            ckca__plan_note_read(p, ckca__stored_node(m, x->source, p->mode, NULL), moment);
        if (ckca__reads_output(m, i)) ckca__plan_note_read(p, i, moment);
    }
    for (i = m->nodes - 1; i >= 0; i--) { /* outputs read after the last convolution are kept: they are small */
        const ckca__node *x = &m->node[i];
        if (x->fused || x->constant || x->head < 0 || p->last_reader[i] >= last || p->last_read[i] < 0 ||
            (p->mode & CKCA__MODE_READABLE) || !m->recompute_outputs) {
            p->last_item[i] = CKCA__ITEM_KEPT;
            continue;
        }
        if (p->first_read[i] < p->end) ckca__plan_add_live(p, p->first_read[i], p->last_read[i], ckca__node_floats(x));
        for (side = 0; side < 2; side++) {
            int from = ckca__stored_node(m, side ? x->residual : x->source, p->mode, NULL);
            if (from >= 0 && p->last_read[from] < p->last_read[i]) p->last_read[from] = p->last_read[i];
        }
    }
}

/* Adds what is needed for node i's output to be readable in the backward of node j: for that backward itself, or as an
   intermediate, to recompute another output. Returns its item in the list; -1 if it is kept, or on failure (*failed). */
static int ckca__plan_recompute(ckca__planner *p, int i, int j, int intermediate, int *failed) {
    ckca_model *m = p->m;
    const ckca__node *x = &m->node[i];
    const int moment = p->end - 1 - j;
    const size_t size = ckca__node_floats(x);
    int k = p->last_item[i], residual = ckca__stored_node(m, x->residual, p->mode, NULL);
    ckca__recompute *item;
    if (k == CKCA__ITEM_KEPT || *failed) return -1;
    if (k >= 0 && m->recompute[p->mode][k].last_use >= moment) {
        m->recompute[p->mode][k].intermediate &= intermediate;
        return k;
    }
    if (!intermediate) p->live[moment] -= size; /* ckca__plan_backward counted it, but it does not exist yet */
    ckca__plan_recompute(p, x->source, j, 1, failed);
    if (residual >= 0) residual = ckca__plan_recompute(p, residual, j, 1, failed);
    if (*failed || !ckca__grow(m->ctx, (void **)&m->recompute[p->mode], (size_t)m->recomputes[p->mode],
                               &m->recompute_capacity[p->mode], sizeof *item)) {
        *failed = 1;
        return -1;
    }
    k = p->last_item[i] = m->recomputes[p->mode]++;
    item = &m->recompute[p->mode][k];
    item->node = i;
    item->before = j;
    item->intermediate = intermediate;
    item->buffer_of = k;
    if (residual >= 0 && item[residual - k].intermediate && item[residual - k].last_use == moment) {
        item->buffer_of = item[residual - k].buffer_of; /* overwrites the residual, which nothing else reads */
        item[residual - k].last_use = -1;
    }
    item->last_use = p->last_read[i];
    if (intermediate) { /* kept until its own reader needs it, or only for this moment */
        int first_use = item->buffer_of == k ? moment : moment + 1,
            last_use = p->first_read[i] < p->end ? p->first_read[i] - 1 : p->last_read[i];
        if (ckca__plan_peak(p, first_use, last_use, size) > p->peak) item->last_use = last_use = moment;
        ckca__plan_add_live(p, first_use, last_use, size);
    } else if (item->buffer_of == k)
        ckca__plan_add_live(p, moment, moment, size);
    item[item->buffer_of - k].buffer_end = item->last_use;
    return k;
}

/* Fills in a buffer of the plan and counts it as live. */
static void ckca__plan_add_buffer(ckca__planner *p, ckca__buffer *b, size_t size, size_t *offset, int first_use,
                                  int last_use) {
    b->size = size;
    b->offset = offset;
    b->first_use = first_use;
    b->last_use = last_use;
    ckca__plan_add_live(p, first_use, last_use, size);
}

/* Assigns offsets, to the largest buffer first: the lowest at which no buffer overlaps that is live at the same time.
   Returns the total number of floats per picture. */
static size_t ckca__plan_offsets(ckca__buffer *list, int count) {
    size_t total = 0;
    int i, j;
    qsort(list, (size_t)count, sizeof *list, ckca__largest_first);
    for (i = 0; i < count; i++) {
        size_t offset = 0;
        int moved = 1;
        while (moved) {
            moved = 0;
            for (j = 0; j < i; j++) {
                const ckca__buffer *o = &list[j];
                if (o->last_use < list[i].first_use || list[i].last_use < o->first_use) continue;
                if (offset < *o->offset + o->size && *o->offset < offset + list[i].size) {
                    offset = *o->offset + o->size;
                    moved = 1;
                }
            }
        }
        *list[i].offset = offset;
        if (total < offset + list[i].size) total = offset + list[i].size;
    }
    return total;
}

static int ckca__largest_first(const void *a, const void *b) {
    const ckca__buffer *x = (const ckca__buffer *)a, *y = (const ckca__buffer *)b;
    if (x->size != y->size) return x->size < y->size ? 1 : -1;
    return x->first_use != y->first_use ? (x->first_use < y->first_use ? -1 : 1)
                                        : (x->last_use < y->last_use ? -1 : x->last_use > y->last_use);
}

/* The peak over the moments first_use to last_use if a buffer of size floats were added. */
static size_t ckca__plan_peak(const ckca__planner *p, int first_use, int last_use, size_t size) {
    size_t most = 0;
    for (; first_use <= last_use; first_use++)
        if (most < p->live[first_use] + size) most = p->live[first_use] + size;
    return most;
}

/* Counts a buffer of size floats as live in the moments first_use to last_use. */
static void ckca__plan_add_live(ckca__planner *p, int first_use, int last_use, size_t size) {
    size_t most = ckca__plan_peak(p, first_use, last_use, size);
    if (p->peak < most) p->peak = most;
    for (; first_use <= last_use; first_use++) p->live[first_use] += size;
}

/* Backward reads node i's output at moment. */
static void ckca__plan_note_read(ckca__planner *p, int i, int moment) {
    if (p->first_read[i] > moment) p->first_read[i] = moment;
    if (p->last_read[i] < moment) p->last_read[i] = moment;
}

/* Floats per picture of a node's output, or of its gradient. */
static size_t ckca__node_floats(const ckca__node *x) {
    const size_t values = (size_t)x->h * (size_t)x->w * (size_t)x->c;
    return ckca__round_up(x->bf16 ? (values + 1) / 2 : values, CKCA__ALIGN / sizeof(float));
}

/* ===================================================================================================================
   CHECKPOINTS                                                                                            >>checkpoint

   A checkpoint is a safetensors file with PyTorch's names and shapes; its metadata holds what ckca_load needs (see FILE
   FORMATS in the manual). A training state is a checkpoint that also has momentum.* and ckca.state.
   =================================================================================================================== */

#define CKCA__FORMAT 1 /* incremented when older versions of the library would misread new files */

/* ---- types shared with SAFETENSORS ---- */

/* Text that grows. After a failed allocation failed is 1 and the text no longer changes. */
typedef struct ckca__text {
    ckca_context *ctx;
    char *bytes; /* length bytes and a zero */
    size_t length, capacity;
    int failed;
} ckca__text;

typedef struct ckca__st_tensor {
    const char *name;
    char dtype[8]; /* "F32", "I64", ... */
    int dims;
    int64_t shape[8];
    size_t begin, end; /* its values are bytes[begin..end) of the file */
} ckca__st_tensor;

typedef struct ckca__st_pair {
    const char *key, *value;
} ckca__st_pair;

typedef struct ckca__st_file {
    ckca_context *ctx;
    const char *path; /* for messages */
    const unsigned char *bytes;
    unsigned char *owned;    /* bytes if ckca__st_open read them, else NULL; ckca__st_close releases it */
    char *text;              /* the header; names and metadata point into it */
    ckca__st_tensor *tensor; /* sorted by name */
    ckca__st_pair *meta;     /* sorted by key */
    size_t tensors, metas;
} ckca__st_file;

/* A tensor to be written. */
typedef struct ckca__st_item {
    const char *name, *dtype;
    int dims;
    int64_t shape[8];
    const void *data; /* NULL: comes from fetch, see ckca__st_write_all */
} ckca__st_item;

/* In SAFETENSORS: */
static void ckca__text_add(ckca__text *text, const char *bytes, size_t n);
static void ckca__text_puts(ckca__text *text, const char *string);
static void ckca__text_number(ckca__text *text, uint64_t value);
static char *ckca__names_to_json(ckca_context *ctx, const char *const *names, int n);
static ckca_status ckca__names_from_json(ckca_context *ctx, const char *path, const char *text, char ***names, int *n);
static void ckca__st_close(ckca__st_file *file);
static int ckca__st_by_name(const void *a, const void *b);
static ckca_status ckca__st_parse(ckca_context *ctx, const char *path, const unsigned char *bytes, size_t size,
                                  ckca__st_file *file);
static const ckca__st_tensor *ckca__st_find(const ckca__st_file *file, const char *name);
static const char *ckca__st_meta(const ckca__st_file *file, const char *key);
static ckca_status ckca__st_read_floats(const ckca__st_file *file, const ckca__st_tensor *tensor, float *out);
#ifndef CKCA_NO_STDIO
static ckca_status ckca__st_open(ckca_context *ctx, const char *path, ckca__st_file *file);
#endif
static ckca_status ckca__st_write_memory(ckca_context *ctx, void *out, size_t capacity, size_t *size,
                                         const ckca__st_item *items, int count, const ckca__st_pair *meta, int metas,
                                         const void *(*fetch)(void *user, int i), void *user);
#ifndef CKCA_NO_STDIO
#ifdef CKCA__POSIX
static int ckca__lock_path(const char *path);
#endif
#endif
#ifndef CKCA_NO_STDIO
static ckca_status ckca__st_write(ckca_context *ctx, const char *path, const ckca__st_item *items, int count,
                                  const ckca__st_pair *meta, int metas, const void *(*fetch)(void *user, int i),
                                  void *user);
#endif

/* ---- loading ---- */

/* Parses a non-negative number as %.9g writes it, in any locale, and moves *text past it. Returns 0 if there is none. */
static int ckca__parse_decimal(const char **text, double *value) {
    const char *p = *text;
    double mantissa = 0;
    int digits = 0, exponent = 0, sign = 1, shift = 0, point = 0;
    for (;; p++) {
        if (*p == '.' && !point)
            point = 1;
        else if (*p >= '0' && *p <= '9' && digits < 17) {
            mantissa = mantissa * 10 + (*p - '0');
            shift -= point;
            digits++;
        } else
            break;
    }
    if (!digits) return 0;
    if (*p == 'e') {
        p++;
        if (*p == '-' || *p == '+') sign = *p++ == '-' ? -1 : 1;
        if (*p < '0' || *p > '9') return 0;
        while (*p >= '0' && *p <= '9' && exponent < 100) exponent = exponent * 10 + (*p++ - '0');
    }
    exponent = sign * exponent + shift;
    if (exponent < -80 || exponent > 40) return 0;
    *value = exponent < 0 ? mantissa / pow(10, -exponent) : mantissa * pow(10, exponent);
    *text = p;
    return 1;
}

/* Parses count whole numbers from 0 to INT_MAX, separated by single spaces. Returns 0 if text is anything else. */
static int ckca__parse_integers(const char *text, int *value, int count) {
    int i;
    for (i = 0; text && i < count; i++) {
        int64_t v = 0;
        if (i && *text++ != ' ') return 0;
        if (*text < '0' || *text > '9') return 0;
        while (*text >= '0' && *text <= '9' && v <= INT_MAX) v = v * 10 + (*text++ - '0');
        if (v > INT_MAX) return 0;
        value[i] = (int)v;
    }
    return text && !*text;
}

/* Parses count numbers from 0 to below 1e6, separated by single spaces. Returns 0 if text is anything else. */
static int ckca__parse_floats(const char *text, float *value, int count) {
    int i;
    for (i = 0; text && i < count; i++) {
        double v;
        int negative;
        if (i && *text++ != ' ') return 0;
        negative = *text == '-';
        text += negative;
        if (!ckca__parse_decimal(&text, &v) || !(v <= 1e6)) return 0;
        value[i] = (float)(negative ? -v : v);
    }
    return text && !*text;
}

/* Refuses files of a newer format, whose metadata may have other meanings. A file without ckca.format has format 1. */
static ckca_status ckca__check_format(const ckca__st_file *file) {
    const char *format = ckca__st_meta(file, "ckca.format");
    int number;
    if (!format || (ckca__parse_integers(format, &number, 1) && number <= CKCA__FORMAT)) return CKCA_OK;
    if (*format && strspn(format, "0123456789") == strlen(format))
        return ckca__fail(file->ctx, CKCA_EFORMAT,
                          "%s: a newer ckca.h wrote it: its ckca.format is %.20s, ckca.h " CKCA_VERSION
                          " reads up to %d",
                          ckca__tail(file->path), format, CKCA__FORMAT);
    return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: ckca.format \"%.20s\" is not a whole number",
                      ckca__tail(file->path), format);
}

/* Decodes exactly size bytes of base64 (RFC 4648, padded). Returns 0 if text is anything else. */
static int ckca__parse_base64(const char *text, unsigned char *out, size_t size) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t at, k;
    if (strlen(text) != ckca__mul(ckca__sum(size, 2) / 3, 4)) return 0;
    for (at = 0; at < size; at += 3, text += 4) {
        const size_t n = size - at < 3 ? size - at : 3;
        uint32_t bits = 0;
        for (k = 0; k < 4; k++) {
            const char *digit = k <= n ? strchr(digits, text[k]) : "";
            if (k <= n ? !digit || !text[k] : text[k] != '=') return 0;
            bits = bits << 6 | (k <= n ? (uint32_t)(digit - digits) : 0);
        }
        for (k = 0; k < n; k++) out[at + k] = (unsigned char)(bits >> (16 - 8 * k));
        if (bits & ((1u << (24 - 8 * n)) - 1)) return 0; /* bits that no byte has */
    }
    return 1;
}

/* Takes class means from a file's metadata: ckca.class_counts, int64, and ckca.class_means, float32, both little-endian
   in base64. Without them *centroids stays empty. */
static ckca_status ckca__read_centroids(const ckca_model *m, const ckca__st_file *file, ckca__centroids *centroids) {
    const char *counts = ckca__st_meta(file, "ckca.class_counts"), *means = ckca__st_meta(file, "ckca.class_means");
    const char *path = ckca__tail(file->path);
    const size_t k = (size_t)m->classes, d = (size_t)m->features;
    size_t i, j;
    centroids->count = NULL;
    if ((!counts && !means) || !ckca__fits_featreg(m, m, CKCA_FEATREG_CENTROID)) return CKCA_OK;
    if (!ckca__centroids_alloc(m, centroids))
        return ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for the means of %d classes", path, m->classes);
    if (!counts || !means || !ckca__parse_base64(counts, (unsigned char *)centroids->count, k * sizeof(int64_t)) ||
        !ckca__parse_base64(means, (unsigned char *)centroids->mean, k * d * sizeof(float)))
        return ckca__fail(m->ctx, CKCA_EFORMAT,
                          "%s: ckca.class_counts and ckca.class_means are not %d and %d x %d numbers in base64", path,
                          m->classes, m->classes, m->features);
    for (i = 0; i < k; i++) {
        if (centroids->count[i] < 0 || centroids->count[i] > CKCA__COUNT_MAX)
            return ckca__fail(m->ctx, CKCA_EFORMAT, "%s: ckca.class_counts has %.0f pictures of class %d", path,
                              (double)centroids->count[i], (int)i);
        for (j = 0; j < d; j++) {
            if (!isfinite(centroids->mean[i * d + j]))
                return ckca__fail(m->ctx, CKCA_ENAN, "%s: ckca.class_means is not finite: feature %d of class %d", path,
                                  (int)j, (int)i);
            if (!centroids->count[i]) centroids->mean[i * d + j] = 0;
        }
    }
    return CKCA_OK;
}

/* Reads ckca.mean and ckca.std, if the file has them, into *normalization (NULL: it has none), which the caller
   releases. */
static ckca_status ckca__read_normalization(const ckca_model *m, const ckca__st_file *file, float **normalization) {
    const char *mean = ckca__st_meta(file, "ckca.mean"), *std = ckca__st_meta(file, "ckca.std");
    const char *path = ckca__tail(file->path);
    const size_t channels = (size_t)m->channels;
    float *values;
    ckca_status status = CKCA_OK;
    size_t i;
    *normalization = NULL;
    if (!mean && !std) return CKCA_OK;
    values = (float *)ckca__alloc(m->ctx, channels * 2 * sizeof(float));
    if (!values)
        return ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for the mean of %d channels", path, m->channels);
    if (!ckca__parse_floats(mean, values, m->channels) || !ckca__parse_floats(std, values + channels, m->channels))
        status =
            ckca__fail(m->ctx, CKCA_EFORMAT, "%s: ckca.mean and ckca.std are not %d numbers each", path, m->channels);
    for (i = channels; !status && i < 2 * channels; i++)
        if (!(values[i] > 0))
            status = ckca__fail(m->ctx, CKCA_EFORMAT, "%s: ckca.std has a value that is not above 0", path);
    if (status)
        ckca__release(m->ctx, values);
    else
        *normalization = values;
    return status;
}

static void ckca__set_normalization(ckca_model *m, float *normalization) {
    if (!normalization) return;
    ckca__release(m->ctx, m->normalization);
    m->normalization = normalization;
    m->normalized = 1;
}

/* Takes class names, normalisation, the number of updates (ckca.step) and of pictures, and class means from a file's
   metadata. */
static ckca_status ckca__read_metadata(ckca_model *m, const ckca__st_file *file) {
    const char *names = ckca__st_meta(file, "ckca.class_names"), *step = ckca__st_meta(file, "ckca.step");
    const char *pictures = ckca__st_meta(file, "ckca.pictures"), *path = ckca__tail(file->path);
    char **list = NULL;
    float *normalization = NULL;
    int count = 0, updates = 1; /* weights without ckca.step were trained by another program */
    int64_t known = 0;
    ckca__centroids centroids = {NULL, NULL};
    ckca_status status = CKCA_OK;
    if (pictures && (!*pictures || strspn(pictures, "0123456789") != strlen(pictures) || strlen(pictures) > 15))
        return ckca__fail(m->ctx, CKCA_EFORMAT, "%s: ckca.pictures \"%.20s\" is not a whole number below 1e15", path,
                          pictures);
    for (; pictures && *pictures; pictures++) known = known * 10 + (*pictures - '0');
    if (step && !ckca__parse_integers(step, &updates, 1))
        return ckca__fail(m->ctx, CKCA_EFORMAT, "%s: ckca.step \"%.20s\" is not a whole number", path, step);
    if (names && (status = ckca__names_from_json(m->ctx, file->path, names, &list, &count))) return status;
    if (names && count != m->classes)
        status = ckca__fail(m->ctx, CKCA_EFORMAT, "%s: %d class names for %d classes", path, count, m->classes);
    if (!status) status = ckca__read_normalization(m, file, &normalization);
    if (!status) status = ckca__read_centroids(m, file, &centroids);
    if (status) {
        ckca__free_names(m->ctx, list, count);
        ckca__release(m->ctx, normalization);
        ckca__release(m->ctx, centroids.count);
        return status;
    }
    if (list) {
        ckca__free_names(m->ctx, m->class_names, m->classes);
        m->class_names = list;
    }
    ckca__set_normalization(m, normalization);
    m->updates = updates;
    m->pictures = known;
    ckca__release(m->ctx, m->centroids.count);
    m->centroids = centroids; /* none in the file: the model's were of other weights */
    return CKCA_OK;
}

/* A shape as text: "64x3x3x3"; "a single value" if dims is 0. */
static void ckca__shape_text(const int64_t *shape, int dims, char *out, size_t capacity) {
    size_t at = 0;
    int i;
    snprintf(out, capacity, "a single value");
    for (i = 0; i < dims && at < capacity; i++)
        at += (size_t)snprintf(out + at, capacity - at, "%s%.0f", i ? "x" : "", (double)shape[i]);
}

/* 1 if the tensor of a file has the shape of parameter p. */
static int ckca__fits(const ckca__st_tensor *tensor, const ckca__parameter *p) {
    int i, fits = tensor->dims == p->dims;
    for (i = 0; fits && i < p->dims; i++) fits = tensor->shape[i] == p->shape[i];
    return fits;
}

/* Finds the tensor of parameter p, whose name in the file is p's after prefix, and checks its shape. */
static ckca_status ckca__find_parameter(const ckca__st_file *file, const ckca__parameter *p, const char *prefix,
                                        const ckca__st_tensor **tensor) {
    char name[CKCA__NAME_MAX + 32], has[200], wants[200];
    int64_t shape[4];
    int i;
    snprintf(name, sizeof name, "%s%s", prefix, p->name);
    *tensor = ckca__st_find(file, name);
    if (!*tensor) return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: it has no tensor %s", ckca__tail(file->path), name);
    if (ckca__fits(*tensor, p)) return CKCA_OK;
    for (i = 0; i < p->dims; i++) shape[i] = p->shape[i];
    ckca__shape_text((*tensor)->shape, (*tensor)->dims, has, sizeof has);
    ckca__shape_text(shape, p->dims, wants, sizeof wants);
    return ckca__fail(file->ctx, CKCA_ESHAPE, "%s: %s is %s in the file, %s in the model", ckca__tail(file->path), name,
                      has, wants);
}

/* Reads all parameters (of their momentum only the trainable ones') into host, in the arenas' layout: m->all floats, or
   m->trained if momentum is 1. */
static ckca_status ckca__read_parameters(const ckca_model *m, const ckca__st_file *file, const char *prefix,
                                         int momentum, float *host) {
    float *file_order = NULL;
    size_t most = 0;
    int i;
    ckca_status status = CKCA_OK;
    for (i = 0; i < m->parameters; i++)
        if (m->parameter[i].count > most) most = m->parameter[i].count;
    file_order = (float *)ckca__alloc(m->ctx, most * sizeof(float));
    if (!file_order)
        return ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for %.1f MB", ckca__tail(file->path),
                          (double)most * 4e-6);
    for (i = 0; !status && i < m->parameters; i++) {
        const ckca__parameter *p = &m->parameter[i];
        const ckca__st_tensor *tensor;
        if (momentum && !ckca__has_momentum(m, p)) continue;
        if ((status = ckca__find_parameter(file, p, prefix, &tensor)) ||
            (status = ckca__st_read_floats(file, tensor, file_order)) ||
            (status = ckca__check_finite(m->ctx, ckca__tail(file->path), prefix, p, file_order)))
            break;
        ckca__reorder(p, file_order, host + (momentum ? p->slot : p->offset), 0);
    }
    ckca__release(m->ctx, file_order);
    return status;
}

/* Prefixes that PyTorch wrappers (DataParallel, torch.compile) and common attributes add to the names of a network. */
static const char *const ckca__prefixes[] = {"module.", "_orig_mod.", "model.", "backbone."};

/* The rest of name after such a prefix, or NULL. */
static const char *ckca__strip_prefix(const char *name) {
    size_t i;
    for (i = 0; i < sizeof ckca__prefixes / sizeof *ckca__prefixes; i++)
        if (!strncmp(name, ckca__prefixes[i], strlen(ckca__prefixes[i]))) return name + strlen(ckca__prefixes[i]);
    return NULL;
}

/* Strips prefixes from name until it is the name of a tensor of the model, which it returns; NULL if it never is.
   *parameter: the parameter's index, or -1 for num_batches_tracked. */
static const char *ckca__unprefixed_name(const ckca_model *m, const char *name, int *parameter) {
    for (; name; name = ckca__strip_prefix(name)) {
        const char *suffix = strrchr(name, '.');
        const int counts = suffix && !strcmp(suffix, ".num_batches_tracked");
        int i;
        for (i = 0; i < m->parameters; i++) {
            const ckca__parameter *p = &m->parameter[i];
            const char *node = m->node[p->node].name;
            *parameter = counts ? -1 : i;
            if (counts ? p->role == CKCA__ROLE_VAR && strlen(node) == (size_t)(suffix - name) &&
                             !strncmp(node, name, strlen(node))
                       : !strcmp(p->name, name))
                return name;
        }
    }
    return NULL;
}

/* The length of the common beginning and end of two names. */
static size_t ckca__similarity(const char *a, const char *b) {
    size_t m = strlen(a), n = strlen(b), front = 0, back = 0;
    while (front < m && front < n && a[front] == b[front]) front++;
    while (back + front < m && back + front < n && a[m - 1 - back] == b[n - 1 - back]) back++;
    return front + back;
}

/* Fails because the file has no tensor of this name; the message lists the most similar names. prefixes: why stripping
   prefixes did not help, or "". */
static ckca_status ckca__missing_tensor(const ckca__st_file *file, const char *name, const char *prefixes) {
    const char *nearest[3] = {NULL, NULL, NULL};
    char has[250] = "";
    size_t i, k, like[3] = {0, 0, 0}, at = 0;
    for (i = 0; i < file->tensors; i++) {
        size_t likeness = ckca__similarity(name, file->tensor[i].name) + 1;
        for (k = 3; k > 0 && likeness > like[k - 1]; k--) {
            if (k < 3) {
                like[k] = like[k - 1];
                nearest[k] = nearest[k - 1];
            }
            like[k - 1] = likeness;
            nearest[k - 1] = file->tensor[i].name;
        }
    }
    for (k = 0; k < 3 && nearest[k] && at < sizeof has; k++)
        at += (size_t)snprintf(has + at, sizeof has - at, "%s%.70s", k ? ", " : " The nearest: ", nearest[k]);
    return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: it has %.0f tensors, but no %s.%s%s", ckca__tail(file->path),
                      (double)file->tensors, name, has, prefixes);
}

/* 1 for the tensors that only training states have. */
static int ckca__is_state_tensor(const char *name) {
    return !strncmp(name, "momentum.", 9) || !strncmp(name, "best.", 5);
}

/* Strips prefixes from the file's names if every tensor then has exactly one counterpart in the model. */
static ckca_status ckca__match_names(const ckca_model *m, ckca__st_file *file) {
    const char **bare, *missing = NULL;
    char why[200] = "";
    unsigned char *seen;
    size_t i;
    int j, prefixed = 0;
    for (j = 0; !missing && j < m->parameters; j++)
        if (!ckca__st_find(file, m->parameter[j].name)) missing = m->parameter[j].name;
    if (!missing) return CKCA_OK;
    bare = (const char **)ckca__alloc(m->ctx, file->tensors * sizeof *bare);
    seen = (unsigned char *)ckca__alloc(m->ctx, (size_t)m->parameters);
    if (!bare || !seen) {
        ckca__release(m->ctx, bare);
        ckca__release(m->ctx, seen);
        return ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for its names", ckca__tail(file->path));
    }
    for (i = 0; i < file->tensors; i++) prefixed |= ckca__strip_prefix(file->tensor[i].name) != NULL;
    for (i = 0; i < file->tensors && !*why && prefixed; i++) {
        const char *name = file->tensor[i].name;
        bare[i] = ckca__is_state_tensor(name) ? name : ckca__unprefixed_name(m, name, &j);
        if (!bare[i])
            snprintf(why, sizeof why, ". Without prefixes %.80s would not fit either", name);
        else if (bare[i] != name && j >= 0 && seen[j])
            snprintf(why, sizeof why, ". Without prefixes there would be two of %.80s", bare[i]);
        else if (!ckca__is_state_tensor(name) && j >= 0)
            seen[j] = 1;
    }
    for (j = 0; j < m->parameters && !*why && prefixed; j++)
        if (!seen[j])
            snprintf(why, sizeof why, ". Without prefixes %.80s would still be missing", m->parameter[j].name);
    if (prefixed && !*why) {
        for (i = 0; i < file->tensors; i++) file->tensor[i].name = bare[i];
        qsort(file->tensor, file->tensors, sizeof *file->tensor, ckca__st_by_name);
    }
    ckca__release(m->ctx, bare);
    ckca__release(m->ctx, seen);
    return prefixed && !*why ? CKCA_OK : ckca__missing_tensor(file, missing, why);
}

/* Checks that the file has exactly the model's tensors: an extra one means that the file is of another network. */
static ckca_status ckca__check_tensors(const ckca_model *m, ckca__st_file *file) {
    const ckca__st_tensor *tensor;
    ckca_status status;
    size_t i;
    int j;
    if ((status = ckca__match_names(m, file))) return status;
    for (i = 0; i < (size_t)m->parameters; i++)
        if ((status = ckca__find_parameter(file, &m->parameter[i], "", &tensor))) return status;
    for (i = 0; i < file->tensors; i++) {
        const char *name = file->tensor[i].name, *suffix = strrchr(name, '.');
        if ((suffix && !strcmp(suffix, ".num_batches_tracked")) || ckca__is_state_tensor(name)) continue;
        for (j = 0; j < m->parameters; j++)
            if (!strcmp(m->parameter[j].name, name)) break;
        if (j == m->parameters)
            return ckca__fail(m->ctx, CKCA_EFORMAT, "%s: its tensor %.80s is not in this network",
                              ckca__tail(file->path), name);
    }
    return CKCA_OK;
}

/* Reads PyTorch's count of training forward passes from the first batch norm. */
static void ckca__read_batches_tracked(ckca_model *m, const ckca__st_file *file) {
    int i;
    for (i = 0; i < m->nodes; i++) {
        const ckca__st_tensor *tracked;
        char name[CKCA__NAME_MAX + 32];
        if (!ckca__has_flag(m, i, CKCA__LAYER_BATCH_STATISTICS)) continue;
        snprintf(name, sizeof name, "%s.num_batches_tracked", m->node[i].name);
        tracked = ckca__st_find(file, name);
        if (tracked && !strcmp(tracked->dtype, "I64") && tracked->end - tracked->begin == 8)
            memcpy(&m->batches_tracked, file->bytes + tracked->begin, 8);
        return;
    }
}

/* Loads weights and metadata into a finished model; on failure the model does not change. */
static ckca_status ckca__load_into(ckca_model *m, ckca__st_file *file) {
    float *host;
    ckca_status status;
    if ((status = ckca__check_format(file)) || (status = ckca__check_tensors(m, file))) return status;
    host = (float *)ckca__alloc(m->ctx, m->all * sizeof(float));
    if (!host)
        return ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for %.1f MB", ckca__tail(file->path),
                          (double)m->all * 4e-6);
    status = ckca__read_parameters(m, file, "", 0, host);
    if (!status) status = ckca__read_metadata(m, file);
    if (!status) {
        ckca__device_upload(m->ctx, m->values, host, m->all * sizeof(float));
        m->folded_valid = m->frozen_valid = 0;
        ckca__read_batches_tracked(m, file);
        status = ckca__device_status(m->ctx);
    }
    ckca__release(m->ctx, host);
    return status;
}

/* Finds each parameter's tensor by name, with as many prefixes removed as it takes: chosen (m->parameters pointers,
   NULL: none). The name itself goes before one with prefixes; two of those are an error. */
static ckca_status ckca__choose_tensors(const ckca_model *m, const ckca__st_file *file,
                                        const ckca__st_tensor **chosen) {
    size_t i;
    int j;
    for (i = 0; i < file->tensors; i++) {
        const ckca__st_tensor *tensor = &file->tensor[i];
        const char *bare = ckca__unprefixed_name(m, tensor->name, &j);
        if (!bare || j < 0) continue;
        if (chosen[j] && bare != tensor->name && strcmp(chosen[j]->name, bare))
            return ckca__fail(m->ctx, CKCA_EFORMAT, "%s: both %.80s and %.80s would be %.80s", ckca__tail(file->path),
                              chosen[j]->name, tensor->name, bare);
        if (!chosen[j] || bare == tensor->name) chosen[j] = tensor;
    }
    return CKCA_OK;
}

static void ckca__note_first(char *first, size_t capacity, const char *name) {
    if (!*first) snprintf(first, capacity, "%.*s", (int)capacity - 1, name);
}

/* Fills the report and reads the tensors that fit into host (m->all floats, which hold the model's values). */
static ckca_status ckca__read_backbone(const ckca_model *m, const ckca__st_file *file,
                                       const ckca__st_tensor *const *chosen, float *host, float *file_order,
                                       ckca_backbone *report) {
    size_t i;
    int j;
    ckca_status status;
    for (j = 0; j < m->parameters; j++) {
        const ckca__parameter *p = &m->parameter[j];
        if (p->node == m->logits) continue;
        if (!chosen[j] || !ckca__fits(chosen[j], p)) {
            report->missing++;
            ckca__note_first(report->first_missing, sizeof report->first_missing, p->name);
            continue;
        }
        if ((status = ckca__st_read_floats(file, chosen[j], file_order)) ||
            (status = ckca__check_finite(m->ctx, ckca__tail(file->path), "", p, file_order)))
            return status;
        ckca__reorder(p, file_order, host + p->offset, 0);
        report->taken++;
    }
    for (i = 0; i < file->tensors; i++) {
        const ckca__st_tensor *tensor = &file->tensor[i];
        const char *name = tensor->name, *suffix = strrchr(name, '.');
        if ((suffix && !strcmp(suffix, ".num_batches_tracked")) || !strncmp(name, "momentum.", 9)) continue;
        if (ckca__unprefixed_name(m, name, &j) && j >= 0 && chosen[j] == tensor &&
            (m->parameter[j].node == m->logits || ckca__fits(tensor, &m->parameter[j])))
            continue;
        report->left++;
        ckca__note_first(report->first_left, sizeof report->first_left, name);
    }
    if (report->taken) return CKCA_OK;
    return ckca__fail(m->ctx, CKCA_EFORMAT,
                      "%s: none of its %.0f tensors fits the network by name and shape: it has %.70s, the model %.70s",
                      ckca__tail(file->path), (double)file->tensors,
                      *report->first_left ? report->first_left : "only a head", m->parameter[0].name);
}

static ckca_status ckca__load_backbone(ckca_model *m, const ckca__st_file *file, ckca_backbone *out) {
    const size_t pointers = (size_t)m->parameters * sizeof(const ckca__st_tensor *);
    const ckca__st_tensor **chosen = (const ckca__st_tensor **)ckca__alloc(m->ctx, pointers);
    float *host = (float *)ckca__alloc(m->ctx, m->all * sizeof(float)), *file_order, *normalization = NULL;
    size_t most = 0;
    int i;
    ckca_backbone report;
    ckca_status status;
    memset(&report, 0, sizeof report);
    for (i = 0; i < m->parameters; i++)
        if (m->parameter[i].count > most) most = m->parameter[i].count;
    file_order = (float *)ckca__alloc(m->ctx, most * sizeof(float));
    status = ckca__check_format(file);
    if (!status && (!chosen || !host || !file_order))
        status = ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for %.1f MB", ckca__tail(file->path),
                            (double)m->all * 4e-6);
    if (!status) status = ckca__choose_tensors(m, file, chosen);
    if (!status) ckca__device_download(m->ctx, host, m->values, m->all * sizeof(float));
    if (!status) status = ckca__device_status(m->ctx);
    if (!status) status = ckca__read_backbone(m, file, chosen, host, file_order, &report);
    if (!status) status = ckca__read_normalization(m, file, &normalization);
    if (!status) {
        ckca__device_upload(m->ctx, m->values, host, m->all * sizeof(float));
        m->folded_valid = m->frozen_valid = 0;
        ckca__set_normalization(m, normalization);
        ckca__read_batches_tracked(m, file);
        if (out) *out = report;
        status = ckca__device_status(m->ctx);
    }
    ckca__release(m->ctx, file_order);
    ckca__release(m->ctx, host);
    ckca__release(m->ctx, (void *)chosen);
    return status;
}

/* Builds a model from a checkpoint. */
static ckca_status ckca__load_file(ckca_context *ctx, ckca_model **out, ckca__st_file *file) {
    const char *graph = ckca__st_meta(file, "ckca.graph"), *arch = ckca__st_meta(file, "ckca.arch");
    const char *path = ckca__tail(file->path);
    int input[3], classes, i;
    ckca_model_desc desc;
    ckca_model *m;
    ckca_status status;
    if ((status = ckca__check_format(file))) return status;
    if (!graph)
        return ckca__fail(ctx, CKCA_EFORMAT,
                          "%s: its metadata has no network (ckca.graph): build the model, then call "
                          "ckca_load_weights",
                          path);
    if (!ckca__parse_integers(ckca__st_meta(file, "ckca.input"), input, 3) ||
        !ckca__parse_integers(ckca__st_meta(file, "ckca.classes"), &classes, 1) || classes < 1)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: ckca.input or ckca.classes cannot be read", path);
    memset(&desc, 0, sizeof desc);
    desc.height = input[0];
    desc.width = input[1];
    desc.channels = input[2];
    desc.classes = classes;
    if ((status = ckca_model_create(ctx, &m, &desc))) return status;
    for (i = 0; arch && arch[i] && i < (int)sizeof m->arch - 1; i++) m->arch[i] = arch[i];
    if (arch) m->arch[i] = 0;
    if (!(status = ckca__graph_read(m, graph)) && !(status = ckca__check_tensors(m, file)) &&
        !(status = ckca__allocate_values(m)))
        status = ckca__load_into(m, file);
    if (status) {
        ckca_model_free(m);
        return status;
    }
    *out = m;
    return CKCA_OK;
}

/* ---- saving ---- */

/* For ckca__export_item. */
typedef struct ckca__export {
    ckca_model *m;
    const ckca_model *best; /* NULL, or the weights of the best epoch so far */
    const int *parameter;   /* of each item: p, plus m->parameters if it is p's momentum, twice that if it is in best */
    float *host, *ordered; /* one tensor each */
} ckca__export;

/* The values of item i, in PyTorch's order. */
static const void *ckca__export_item(void *user, int i) {
    const ckca__export *e = (const ckca__export *)user;
    const int kind = e->parameter[i] / e->m->parameters;
    const ckca__parameter *p = &e->m->parameter[e->parameter[i] % e->m->parameters];
    const float *from = kind == 1 ? e->m->momentum + p->slot : (kind == 2 ? e->best : e->m)->values + p->offset;
    ckca__device_download(e->m->ctx, e->host, from, p->count * sizeof(float));
    ckca__reorder(p, e->host, e->ordered, 1);
    return e->ordered;
}

/* Appends count values, formatted with %.9g in any locale, separated by spaces. */
static void ckca__text_floats(ckca__text *text, const float *value, int count) {
    char number[32], *comma;
    int i;
    for (i = 0; i < count; i++) {
        snprintf(number, sizeof number, "%s%.9g", i ? " " : "", (double)value[i]);
        if ((comma = strchr(number, ',')) != NULL) *comma = '.';
        ckca__text_puts(text, number);
    }
}

/* Appends bytes in base64 (RFC 4648, padded). */
static void ckca__text_base64(ckca__text *text, const void *bytes, size_t size) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const unsigned char *in = (const unsigned char *)bytes;
    size_t at, k;
    for (at = 0; at < size; at += 3) {
        const size_t n = size - at < 3 ? size - at : 3;
        uint32_t bits = 0;
        char four[4];
        for (k = 0; k < 3; k++) bits = bits << 8 | (k < n ? in[at + k] : 0u);
        for (k = 0; k < 4; k++) four[k] = k <= n ? digits[bits >> (18 - 6 * k) & 63] : '=';
        ckca__text_add(text, four, 4);
    }
}

/* Writes a checkpoint or, if state (the text of ckca.state) is not NULL, a training state; best: NULL, or the weights of
   its best epoch so far. path NULL: writes to memory, see ckca__st_write_memory. */
static ckca_status ckca__export_model(ckca_model *m, const char *path, const char *state, const ckca_model *best,
                                      void *out, size_t capacity, size_t *size) {
    ckca_context *ctx = m->ctx;
    const int most_items = m->parameters * (best ? 3 : 2) + m->nodes;
    const size_t graph_length = ckca__graph_write(m, NULL, 0) + 1;
    ckca__st_pair meta[20];
    ckca__st_item *item = (ckca__st_item *)ckca__alloc(ctx, (size_t)most_items * sizeof *item);
    char(*name)[CKCA__NAME_MAX + 32] =
        (char(*)[CKCA__NAME_MAX + 32]) ckca__alloc(ctx, (size_t)most_items * sizeof *name);
    int *parameter = (int *)ckca__alloc(ctx, (size_t)most_items * sizeof *parameter);
    char *graph = (char *)ckca__alloc(ctx, graph_length), *names = NULL;
    char input[64], classes[16], step[16], format[16], pictures[24];
    ckca__text mean, std, class_counts, class_means;
    ckca__export export_;
    size_t most = 0;
    int i, k, items = 0, metas = 0;
    ckca_status status = ckca__check_all_finite(m, state ? "update" : path ? ckca__tail(path) : "save", state != NULL);
    memset(&mean, 0, sizeof mean);
    mean.ctx = ctx;
    std = class_counts = class_means = mean;
    for (i = 0; i < m->parameters; i++)
        if (m->parameter[i].count > most) most = m->parameter[i].count;
    export_.m = m;
    export_.best = best;
    export_.parameter = parameter;
    export_.host = (float *)ckca__alloc(ctx, most * sizeof(float));
    export_.ordered = (float *)ckca__alloc(ctx, most * sizeof(float));
    if (m->class_names) names = ckca__names_to_json(ctx, (const char *const *)m->class_names, m->classes);
    if (m->normalized) {
        ckca__text_floats(&mean, m->normalization, m->channels);
        ckca__text_floats(&std, m->normalization + m->channels, m->channels);
    }
    if (m->centroids.count && !state) { /* an update that resumes from a state has them from its checkpoint */
        ckca__text_base64(&class_counts, m->centroids.count, (size_t)m->classes * sizeof(int64_t));
        ckca__text_base64(&class_means, m->centroids.mean, (size_t)m->classes * (size_t)m->features * sizeof(float));
    }
    if (!status &&
        (!item || !name || !parameter || !graph || !export_.host || !export_.ordered || (m->class_names && !names) ||
         mean.failed || std.failed || class_counts.failed || class_means.failed))
        status = ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for saving it", path ? ckca__tail(path) : "save");
    if (!status) {
        ckca__graph_write(m, graph, graph_length);
        snprintf(input, sizeof input, "%d %d %d", m->height, m->width, m->channels);
        snprintf(classes, sizeof classes, "%d", m->classes);
        snprintf(step, sizeof step, "%d", m->updates);
        snprintf(format, sizeof format, "%d", CKCA__FORMAT);
        snprintf(pictures, sizeof pictures, "%.0f", (double)m->pictures);
#define CKCA__META(k, v) (meta[metas].key = k, meta[metas++].value = v)
        CKCA__META("format", "pt"); /* PyTorch's readers require it */
        CKCA__META("ckca.format", format);
        CKCA__META("ckca.version", CKCA_VERSION);
        CKCA__META("ckca.arch", m->arch);
        CKCA__META("ckca.input", input);
        CKCA__META("ckca.classes", classes);
        CKCA__META("ckca.step", step);
        if (names) CKCA__META("ckca.class_names", names);
        if (m->normalized) CKCA__META("ckca.mean", mean.bytes);
        if (m->normalized) CKCA__META("ckca.std", std.bytes);
        if (m->pictures) CKCA__META("ckca.pictures", pictures);
        if (class_means.length) CKCA__META("ckca.class_counts", class_counts.bytes);
        if (class_means.length) CKCA__META("ckca.class_means", class_means.bytes);
        if (state) CKCA__META("ckca.state", state);
        CKCA__META("ckca.graph", graph);
#undef CKCA__META
        for (i = 0; i < m->parameters * (best ? 3 : state ? 2 : 1); i++) {
            static const char *const prefix[3] = {"", "momentum.", "best."};
            const ckca__parameter *p = &m->parameter[i % m->parameters];
            const int kind = i / m->parameters;
            if (kind == 1 && !ckca__has_momentum(m, p)) continue;
            snprintf(name[items], sizeof *name, "%s%s", prefix[kind], p->name);
            item[items].name = name[items];
            item[items].dtype = "F32";
            item[items].dims = p->dims;
            for (k = 0; k < p->dims; k++) item[items].shape[k] = p->shape[k];
            parameter[items++] = i;
            if (kind == 0 && p->role == CKCA__ROLE_VAR) { /* load_state_dict requires the count in every batch norm */
                snprintf(name[items], sizeof *name, "%s.num_batches_tracked", m->node[p->node].name);
                item[items].name = name[items];
                item[items].dtype = "I64";
                item[items++].data = &m->batches_tracked;
            }
        }
        if (!path)
            status =
                ckca__st_write_memory(ctx, out, capacity, size, item, items, meta, metas, ckca__export_item, &export_);
#ifndef CKCA_NO_STDIO
        else
            status = ckca__st_write(ctx, path, item, items, meta, metas, ckca__export_item, &export_);
#endif
    }
    ckca__release(ctx, mean.bytes);
    ckca__release(ctx, std.bytes);
    ckca__release(ctx, class_counts.bytes);
    ckca__release(ctx, class_means.bytes);
    ckca__release(ctx, names);
    ckca__release(ctx, export_.host);
    ckca__release(ctx, export_.ordered);
    ckca__release(ctx, graph);
    ckca__release(ctx, parameter);
    ckca__release(ctx, name);
    ckca__release(ctx, item);
    return status;
}

CKCA_API ckca_status ckca_save_memory(ckca_model *m, void *out, size_t capacity, size_t *size) {
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!size) return ckca__null(m->ctx, "ckca_save_memory", "size");
    if ((status = ckca__check_finished(m, "ckca_save_memory"))) return status;
    *size = 0;
    return ckca__export_model(m, NULL, NULL, NULL, out, capacity, size);
}

CKCA_API ckca_status ckca_load_memory(ckca_context *ctx, ckca_model **out, const void *bytes, size_t size) {
    ckca__st_file file;
    ckca_status status;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!out || !bytes) return ckca__null(ctx, "ckca_load_memory", !out ? "model" : "bytes");
    status = ckca__st_parse(ctx, "memory", (const unsigned char *)bytes, size, &file);
    if (!status) status = ckca__load_file(ctx, out, &file);
    ckca__st_close(&file);
    return status;
}

CKCA_API ckca_status ckca_load_weights_memory(ckca_model *m, const void *bytes, size_t size) {
    ckca__st_file file;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!bytes) return ckca__null(m->ctx, "ckca_load_weights_memory", "bytes");
    if ((status = ckca__check_finished(m, "ckca_load_weights_memory"))) return status;
    status = ckca__st_parse(m->ctx, "memory", (const unsigned char *)bytes, size, &file);
    if (!status) status = ckca__load_into(m, &file);
    ckca__st_close(&file);
    return status;
}

CKCA_API ckca_status ckca_load_backbone_memory(ckca_model *m, const void *bytes, size_t size, ckca_backbone *report) {
    ckca__st_file file;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!bytes) return ckca__null(m->ctx, "ckca_load_backbone_memory", "bytes");
    if ((status = ckca__check_finished(m, "ckca_load_backbone_memory"))) return status;
    status = ckca__st_parse(m->ctx, "memory", (const unsigned char *)bytes, size, &file);
    if (!status) status = ckca__load_backbone(m, &file, report);
    ckca__st_close(&file);
    return status;
}

#ifndef CKCA_NO_STDIO
/* 1 if both paths name the same file. */
static int ckca__same_file(const char *a, const char *b) {
#ifdef CKCA__POSIX
    struct stat x, y;
    if (!stat(a, &x) && !stat(b, &y)) return x.st_dev == y.st_dev && x.st_ino == y.st_ino;
#endif
    return !strcmp(a, b);
}
CKCA_API ckca_status ckca_save(ckca_model *m, const char *path) {
    ckca__unsaved *u;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    m->ctx->agreed = 0;
    status = path ? ckca__check_finished(m, "ckca_save") : ckca__null(m->ctx, "ckca_save", "path");
    if (!status && m->ctx->ranks.rank == 0) status = ckca__export_model(m, path, NULL, NULL, NULL, 0, NULL);
    if ((status = ckca__ranks_agree(m->ctx, "ckca_save", status))) return status;
    for (u = m->unsaved; u; u = u->next) /* these training states are no longer needed */
        if (!ckca__same_file(path, u->state)) remove(u->state);
    ckca__forget_unsaved(m);
    return CKCA_OK;
}
CKCA_API ckca_status ckca_load(ckca_context *ctx, ckca_model **out, const char *path) {
    ckca__st_file file;
    ckca_status status;
    if (!ckca__usable(ctx)) return CKCA_EINVAL;
    if (!out || !path) return ckca__null(ctx, "ckca_load", !out ? "model" : "path");
    status = ckca__st_open(ctx, path, &file);
    if (!status) status = ckca__load_file(ctx, out, &file);
    ckca__st_close(&file);
    return status;
}
CKCA_API ckca_status ckca_load_weights(ckca_model *m, const char *path) {
    ckca__st_file file;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!path) return ckca__null(m->ctx, "ckca_load_weights", "path");
    if ((status = ckca__check_finished(m, "ckca_load_weights"))) return status;
    status = ckca__st_open(m->ctx, path, &file);
    if (!status) status = ckca__load_into(m, &file);
    ckca__st_close(&file);
    return status;
}

CKCA_API ckca_status ckca_load_backbone(ckca_model *m, const char *path, ckca_backbone *report) {
    ckca__st_file file;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!path) return ckca__null(m->ctx, "ckca_load_backbone", "path");
    if ((status = ckca__check_finished(m, "ckca_load_backbone"))) return status;
    status = ckca__st_open(m->ctx, path, &file);
    if (!status) status = ckca__load_backbone(m, &file, report);
    ckca__st_close(&file);
    return status;
}

/* ---- training states ---- */

/* Describes the first setting whose value in the text of a training state differs from u's; "" if none does. */
static void ckca__state_difference(const ckca__update *u, const char *settings, char *out, size_t capacity) {
    int i;
    *out = 0;
    for (i = 0; i < CKCA__SETTINGS; i++) {
        const ckca__setting *s = &ckca__settings[i];
        char key[64];
        const char *at;
        double was;
        if (!s->affects_result) continue;
        snprintf(key, sizeof key, " %s=", s->name);
        at = strstr(settings, key);
        if (!at) continue; /* an older library wrote the state and did not know the setting */
        at += strlen(key);
        if (!ckca__parse_decimal(&at, &was) || (float)was == (float)ckca__setting_get(&u->d, s)) continue;
        snprintf(out, capacity, "its %s was %.7g, now it is %.7g", s->name, was, ckca__setting_get(&u->d, s));
        return;
    }
}

/* Formats count fields, each as 16 hexadecimal digits and a space, into out (17 * count + 1 bytes); returns out. */
static const char *ckca__state_fields(const uint64_t *field, int count, char *out) {
    int i;
    for (i = 0; i < count; i++)
        snprintf(out + 17 * i, 18, "%08lx%08lx ", (unsigned long)(field[i] >> 32),
                 (unsigned long)(field[i] & 0xffffffffu));
    return out;
}
/* Reads them back; 0 if the text is something else. */
static int ckca__state_parse(const char *text, int count, uint64_t *field) {
    static const char digits[] = "0123456789abcdef";
    int i;
    for (i = 0; i < 17 * count; i++) {
        const char *digit = text[i] ? strchr(digits, text[i]) : NULL;
        if (i % 17 == 0) field[i / 17] = 0;
        if (i % 17 == 16 ? text[i] != ' ' : !digit) return 0;
        if (digit) field[i / 17] = field[i / 17] << 4 | (uint64_t)(digit - digits);
    }
    return 1;
}

/* Writes the training state. ckca.state is the fingerprint, epoch, batch, correct predictions, and the bits of the three
   sums, each as 16 hexadecimal digits; then the settings as name=value, for ckca__state_difference; where seconds are
   limited, the planned epochs as plan=value; if there is a best epoch, best= with it, its right pictures and the bits of
   its loss. A space follows each of them. */
static ckca_status ckca__state_save(ckca__update *u) {
    uint64_t field[7];
    char numbers[7 * 17 + 1];
    ckca__text text;
    ckca_status status;
    int i;
    memset(&text, 0, sizeof text);
    text.ctx = u->ctx;
    field[0] = u->fingerprint;
    field[1] = (uint64_t)u->epoch;
    field[2] = (uint64_t)u->batch;
    field[3] = (uint64_t)u->correct;
    memcpy(field + 4, u->sums, sizeof u->sums);
    ckca__text_puts(&text, ckca__state_fields(field, 7, numbers));
    for (i = 0; i < CKCA__SETTINGS; i++) {
        const float value = (float)ckca__setting_get(&u->asked, &ckca__settings[i]);
        if (!ckca__settings[i].affects_result) continue;
        ckca__text_puts(&text, ckca__settings[i].name);
        ckca__text_puts(&text, "=");
        ckca__text_floats(&text, &value, 1);
        ckca__text_puts(&text, " ");
    }
    if (u->d.seconds > 0) {
        ckca__text_puts(&text, "plan=");
        ckca__text_number(&text, (uint64_t)u->d.epochs);
        ckca__text_puts(&text, " ");
    }
    if (u->best_right >= 0) {
        field[0] = (uint64_t)u->report.best_epoch;
        field[1] = (uint64_t)u->best_right;
        memcpy(field + 2, &u->best_loss, sizeof u->best_loss);
        ckca__text_puts(&text, "best=");
        ckca__text_puts(&text, ckca__state_fields(field, 3, numbers));
    }
    status = text.failed ? ckca__fail(u->ctx, CKCA_ENOMEM, "%s: out of memory for saving it", ckca__tail(u->d.state))
                         : ckca__export_model(u->m, u->d.state, text.bytes, u->best_right < 0 ? NULL : u->best, NULL, 0,
                                              NULL);
    ckca__release(u->ctx, text.bytes);
    return status;
}

/* Locks the training state before it is read or written, so that no other update uses it. Fails early if its folder is
   not writable. */
static ckca_status ckca__state_open(ckca__update *u) {
    const size_t length = strlen(u->d.state);
    ckca__unsaved *unsaved = (ckca__unsaved *)ckca__alloc(u->ctx, ckca__sum(sizeof *unsaved, 2 * length + 8));
    if (!unsaved) return ckca__fail(u->ctx, CKCA_ENOMEM, "%s: out of memory for its path", ckca__tail(u->d.state));
    unsaved->state = (char *)(unsaved + 1);
    unsaved->lock = unsaved->state + length + 1;
    snprintf(unsaved->state, length + 1, "%s", u->d.state);
    snprintf(unsaved->lock, length + 6, "%s.lock", u->d.state);
    u->unsaved = unsaved;
#ifdef CKCA__POSIX
    u->lock = ckca__lock_path(unsaved->lock);
    if (u->lock == -2)
        return ckca__fail(u->ctx, CKCA_EIO, "%s: another update is using it (its .lock is held)",
                          ckca__tail(u->d.state));
    if (u->lock == -1)
        return ckca__fail(u->ctx, CKCA_EIO, "%s: its .lock cannot be created: %s", ckca__tail(u->d.state),
                          strerror(errno));
#endif
    return CKCA_OK;
}

/* Unlocks the training state. If the update is done, its path goes to m->unsaved, for ckca_save to remove the file;
   discard: its result was not kept, so the file is removed now. */
static void ckca__state_close(ckca__update *u, int done, int discard) {
    ckca__unsaved *other = u->m->unsaved;
    if (!u->unsaved) return;
    if (done && discard) remove(u->unsaved->state);
#ifdef CKCA__POSIX
    if (u->lock >= 0) {
        remove(u->unsaved->lock); /* before it is released: see ckca__lock_path */
        close(u->lock);
    }
#endif
    while (other && strcmp(other->state, u->unsaved->state)) other = other->next;
    if (done && !discard && !other) {
        u->unsaved->next = u->m->unsaved;
        u->m->unsaved = u->unsaved;
    } else
        ckca__release(u->ctx, u->unsaved);
    u->unsaved = NULL;
}

/* Resumes from the training state if there is one of this update (*found). One of m's own finished updates is ignored
   and later overwritten; one of any other update is an error. */
static ckca_status ckca__state_load(ckca__update *u, int *found) {
    ckca_model *m = u->m;
    const ckca__unsaved *mine = m->unsaved;
    const char *path = ckca__tail(u->d.state), *text;
    uint64_t field[7] = {0, 0, 0, 0, 0, 0, 0}, best[3];
    float *host = NULL, *best_host = NULL;
    ckca__st_file file;
    FILE *probe = fopen(u->d.state, "rb");
    ckca_status status;
    *found = 0;
    if (!probe) {
        if (errno == ENOENT) return CKCA_OK;
        return ckca__fail(u->ctx, CKCA_EIO, "%s: cannot be opened: %s", path, strerror(errno));
    }
    fclose(probe);
    while (mine && strcmp(mine->state, u->d.state)) mine = mine->next;
    status = ckca__st_open(u->ctx, u->d.state, &file);
    if (!status) status = ckca__check_format(&file);
    text = status ? NULL : ckca__st_meta(&file, "ckca.state");
    if (!status && (!text || strlen(text) < 7 * 17))
        status = ckca__fail(u->ctx, CKCA_EFORMAT, "%s: it is not a training state", path);
    if (!status && !ckca__state_parse(text, 7, field))
        status = ckca__fail(u->ctx, CKCA_EFORMAT, "%s: ckca.state cannot be read", path);
    if (!status && field[0] != u->fingerprint && mine) { /* of an update that this model has finished */
        ckca__st_close(&file);
        return CKCA_OK;
    }
    if (!status && field[0] != u->fingerprint) {
        char difference[160];
        ckca__state_difference(u, text + 7 * 17 - 1, difference, sizeof difference);
        status = ckca__fail(u->ctx, CKCA_EINVAL,
                            "%s: it is the training state of another update (%s), whose result may not have been "
                            "saved: finish that update, or remove the file to start over",
                            path,
                            *difference ? difference
                                        : "other pictures, weights, mean, std, seed, teacher, memory, number of ranks, "
                                          "frozen layers or settings");
    }
    if (!status && u->d.seconds > 0) { /* the time is planned already */
        const char *plan = strstr(text + 7 * 17 - 1, " plan=");
        double epochs = 0;
        if (plan) plan += 6;
        if (!plan || !ckca__parse_decimal(&plan, &epochs) || !(epochs >= 1 && epochs <= u->d.epochs))
            status =
                ckca__fail(u->ctx, CKCA_EFORMAT, "%s: ckca.state plans %.0f epochs of %d", path, epochs, u->d.epochs);
        else
            ckca__shorten(u, (int)epochs);
    }
    if (!status &&
        (field[1] >= (uint64_t)u->d.epochs || field[2] > (uint64_t)u->batches || field[3] > (uint64_t)u->data->count))
        status = ckca__fail(u->ctx, CKCA_EFORMAT, "%s: it is at epoch %.0f of %d, batch %.0f of %d", path,
                            (double)field[1], u->d.epochs, (double)field[2], u->batches);
    if (!status) {
        host = (float *)ckca__alloc(u->ctx, (m->all + m->trained) * sizeof(float));
        if (!host)
            status = ckca__fail(u->ctx, CKCA_ENOMEM, "%s: out of memory for %.1f MB", path, (double)m->all * 8e-6);
    }
    if (!status) status = ckca__read_parameters(m, &file, "", 0, host);
    if (!status) status = ckca__read_parameters(m, &file, "momentum.", 1, host + m->all);
    if (!status && u->pick && field[1] > 0) { /* an epoch is complete, so there is a best one */
        const char *text_best = strstr(text, " best=");
        if (!text_best || !ckca__state_parse(text_best + 6, 3, best) || best[0] >= field[1] + 1 ||
            best[1] > (uint64_t)u->pick->count)
            status = ckca__fail(u->ctx, CKCA_EFORMAT, "%s: its best epoch cannot be read", path);
        if (!status) best_host = (float *)ckca__alloc(u->ctx, m->all * sizeof(float));
        if (!status && !best_host)
            status = ckca__fail(u->ctx, CKCA_ENOMEM, "%s: out of memory for %.1f MB", path, (double)m->all * 4e-6);
        if (!status) status = ckca__read_parameters(m, &file, "best.", 0, best_host);
        if (!status) {
            ckca__device_upload(u->ctx, u->best->values, best_host, m->all * sizeof(float));
            u->best->folded_valid = 0;
            u->report.best_epoch = (int)best[0];
            u->best_right = (int)best[1];
            memcpy(&u->best_loss, best + 2, sizeof u->best_loss);
        }
        ckca__release(u->ctx, best_host);
    }
    if (!status) {
        ckca__device_upload(u->ctx, m->values, host, m->all * sizeof(float));
        ckca__device_upload(u->ctx, m->momentum, host + m->all, m->trained * sizeof(float));
        m->folded_valid = 0;
        ckca__read_batches_tracked(m, &file);
        u->epoch = (int)field[1];
        u->batch = (int)field[2];
        u->correct = (int)field[3];
        memcpy(u->sums, field + 4, sizeof u->sums);
        *found = 1;
    }
    ckca__release(u->ctx, host);
    ckca__st_close(&file);
    return status;
}
#else /* CKCA_NO_STDIO: no training states */
static ckca_status ckca__state_open(ckca__update *u) {
    return ckca__fail(u->ctx, CKCA_EINVAL,
                      "update: built without files (CKCA_NO_STDIO), so there is no training state");
}
static void ckca__state_close(ckca__update *u, int done, int discard) { (void)u, (void)done, (void)discard; }
static ckca_status ckca__state_save(ckca__update *u) {
    (void)u;
    return CKCA_OK;
}
static ckca_status ckca__state_load(ckca__update *u, int *found) {
    (void)u, (void)found;
    return CKCA_OK;
}
#endif

/* ===================================================================================================================
   MEMORY OF EARLIER CHUNKS                                                                                   >>memory

   What REPLAY and EWC keep beside the checkpoint: pictures chosen by herding, and the Fisher information. How an update
   uses it, how it takes in a chunk, its file.
   =================================================================================================================== */

enum { CKCA__MEMORY_MOST = 10000000, CKCA__FISHER_BATCH = 16 };

struct ckca_memory {
    ckca_context *ctx;
    int size, updates;                    /* as pictures and updates of ckca_memory_info */
    int height, width, channels, classes; /* of the model */
    ckca_data *data;                      /* the pictures, in a store of their own; NULL: none yet */
    int64_t *seen;                        /* classes: pictures of each class so far */
    float *fisher;                        /* on the device, laid out as the model's gradients; NULL: not kept */
    ckca__parameter *parameter;           /* copied from the model */
    int parameters;
    size_t trainable; /* floats of fisher */
};

/* ---- for an update ---- */

static int ckca__memory_count(const ckca_memory *memory) { return memory && memory->data ? memory->data->count : 0; }

static const float *ckca__memory_fisher(const ckca_memory *memory) { return memory->fisher; }

/* 1 if the loss has EWC's penalty. Before the memory's first chunk there is none. */
static int ckca__memory_penalizes(const ckca__update *u) {
    return u->d.method == CKCA_METHOD_EWC && u->d.memory && u->d.memory->updates > 0 && u->d.ewc_lambda > 0;
}

/* Fails if the method needs a memory that the descriptor does not have. */
static ckca_status ckca__memory_needed(const ckca_model *m, const ckca_update_desc *d) {
    if (d->method == CKCA_METHOD_REPLAY && !(d->memory && d->memory->size))
        return ckca__fail(m->ctx, CKCA_EINVAL,
                          "update: REPLAY needs a memory with pictures (memory, ckca_memory_desc)");
    if (d->method == CKCA_METHOD_EWC && !(d->memory && d->memory->fisher))
        return ckca__fail(m->ctx, CKCA_EINVAL, "update: EWC needs a memory with fisher (memory, ckca_memory_desc)");
    if (d->method == CKCA_METHOD_EWC && m->trained < m->trainable)
        return ckca__fail(m->ctx, CKCA_EINVAL, "update: EWC needs all layers to be trained, and some are frozen");
    return CKCA_OK;
}

/* Checks that a memory fits a model, which has class names. */
static ckca_status ckca__memory_check(const ckca_memory *memory, ckca_model *m) {
    int i, k;
    if (memory->ctx != m->ctx)
        return ckca__fail(m->ctx, CKCA_EINVAL, "memory: it belongs to another context than the model");
    if (memory->height != m->height || memory->width != m->width || memory->channels != m->channels ||
        memory->classes != m->classes)
        return ckca__fail(
            m->ctx, CKCA_ESHAPE,
            "memory: its pictures are %d x %d x %d in %d classes, the model takes %d x %d x %d and has %d "
            "classes",
            memory->height, memory->width, memory->channels, memory->classes, m->height, m->width, m->channels,
            m->classes);
    if (memory->fisher && memory->parameters != m->parameters)
        return ckca__fail(m->ctx, CKCA_ESHAPE, "memory: it is of a network of %d tensors, the model has %d",
                          memory->parameters, m->parameters);
    for (i = 0; memory->fisher && i < m->parameters; i++) {
        const ckca__parameter *a = &memory->parameter[i], *b = &m->parameter[i];
        for (k = 0; k < a->dims && a->dims == b->dims && a->shape[k] == b->shape[k];) k++;
        if (strcmp(a->name, b->name) || a->dims != b->dims || k < a->dims)
            return ckca__fail(m->ctx, CKCA_ESHAPE, "memory: its tensor %s differs from the model's %s in name or shape",
                              a->name, b->name);
    }
    return memory->data ? ckca__bind_data(m, memory->data, "memory") : CKCA_OK;
}

/* Checks the memory of an update, and joins its pictures with the chunk. */
static ckca_status ckca__memory_join(ckca__update *u) {
    const ckca_memory *memory = u->d.memory;
    ckca_data *parts[2];
    ckca_status status = ckca__memory_check(memory, u->m);
    if (!status && memory->updates > u->m->updates)
        status =
            ckca__fail(u->ctx, CKCA_EINVAL,
                       "memory: it has taken in the chunk of update %d, but the model has had %d updates: it is of a "
                       "later checkpoint",
                       memory->updates, u->m->updates);
    if (status || !memory->data) return status;
    parts[0] = memory->data;
    parts[1] = (ckca_data *)u->chunk; /* only read */
    if (!(status = ckca_join(&u->joined, parts, 2))) u->data = u->joined;
    return status;
}

/* Extends the fingerprint by the Fisher information. */
static ckca_status ckca__memory_hash(const ckca__update *u, uint64_t *hash) {
    const ckca_memory *memory = u->d.memory;
    const size_t bytes = memory->trainable * sizeof(float);
    float *host = (float *)ckca__alloc(u->ctx, bytes);
    if (!host)
        return ckca__fail(u->ctx, CKCA_ENOMEM, "out of memory for %.1f MB of Fisher information", (double)bytes * 1e-6);
    ckca__device_download(u->ctx, host, memory->fisher, bytes);
    *hash = ckca__hash(*hash, host, bytes);
    ckca__release(u->ctx, host);
    return CKCA_OK;
}

/* ---- taking in a chunk: herding ---- */

/* The features by m of the pictures index[0..n) of data, scaled to length 1, into out: n x m->features. */
static ckca_status ckca__memory_features(ckca_model *m, const ckca_data *data, const int *index, int n, float *out) {
    const size_t d = (size_t)m->features, bytes = ckca__mul(ckca__mul((size_t)n, d), sizeof(float));
    float *device = (float *)ckca__device_alloc(m->ctx, bytes);
    ckca_data *view = NULL;
    ckca_score score;
    ckca_status status =
        device ? ckca_subset(&view, data, index, n)
               : ckca__fail(m->ctx, CKCA_ENOMEM, "memory: out of memory for the features of %d pictures", n);
    size_t i, j;
    if (!status) status = ckca__evaluate_all(m, m, view, &score, NULL, NULL, NULL, device, NULL);
    if (!status) {
        ckca__device_download(m->ctx, out, device, bytes);
        status = ckca__device_status(m->ctx);
    }
    for (i = 0; !status && i < (size_t)n; i++) {
        double square = 0;
        for (j = 0; j < d; j++) square += (double)out[i * d + j] * (double)out[i * d + j];
        for (j = 0; square > 0 && j < d; j++) out[i * d + j] = (float)((double)out[i * d + j] / sqrt(square));
    }
    ckca_data_free(view);
    ckca__device_release(m->ctx, device, bytes);
    return status;
}

/* Herding: chooses keep of n pictures one by one, each so that the mean feature of the chosen ones comes as near to mean
   (d) as it can; the first of equals. feature: n x d. taken: n zeros; sum: d zeros. Writes places 0 to n - 1 to chosen
   (keep). */
static void ckca__herd(int n, size_t d, const float *feature, const double *mean, int keep, unsigned char *taken,
                       double *sum, int *chosen) {
    size_t j;
    int i, k;
    for (k = 0; k < keep; k++) {
        double least = 0;
        int best = -1;
        for (i = 0; i < n; i++) {
            const float *f = feature + (size_t)i * d;
            double distance = 0;
            if (taken[i]) continue;
            for (j = 0; j < d; j++) {
                const double apart = mean[j] - (sum[j] + (double)f[j]) / (k + 1);
                distance += apart * apart;
            }
            if (best >= 0 && !(distance < least)) continue;
            best = i;
            least = distance;
        }
        chosen[k] = best;
        taken[best] = 1;
        for (j = 0; j < d; j++) sum[j] += (double)feature[(size_t)best * d + j];
    }
}

/* Herds one class: of the pictures index[0..n) of joined, the first `kept` of which are the memory's and stand for
   `seen` pictures, writes the chosen ones' indices to chosen (keep). */
static ckca_status ckca__memory_herd(ckca_model *m, const ckca_data *joined, const int *index, int n, int kept,
                                     int64_t seen, int keep, int *chosen) {
    ckca_context *ctx = m->ctx;
    const size_t d = (size_t)m->features;
    float *feature = (float *)ckca__alloc(ctx, ckca__mul(ckca__mul((size_t)n, d), sizeof(float)));
    double *mean = (double *)ckca__alloc(ctx, 2 * d * sizeof(double));
    unsigned char *taken = (unsigned char *)ckca__alloc(ctx, (size_t)n);
    ckca_status status = CKCA_OK;
    size_t j;
    int i;
    if (!feature || !mean || !taken)
        status = ckca__fail(ctx, CKCA_ENOMEM, "memory: out of memory for the features of %d pictures", n);
    if (!status) status = ckca__memory_features(m, joined, index, n, feature);
    if (!status) {
        const double weight = kept ? (double)seen / kept : 0, total = (kept ? (double)seen : 0) + n - kept;
        for (i = 0; i < n; i++)
            for (j = 0; j < d; j++) mean[j] += (i < kept ? weight : 1) / total * (double)feature[(size_t)i * d + j];
        ckca__herd(n, d, feature, mean, keep, taken, mean + d, chosen);
        for (i = 0; i < keep; i++) chosen[i] = index[chosen[i]];
    }
    ckca__release(ctx, feature);
    ckca__release(ctx, mean);
    ckca__release(ctx, taken);
    return status;
}

/* Creates the memory's next set of pictures, *next, from joined (its pictures, then the chunk's), and adds the chunk's
   labels to seen. */
static ckca_status ckca__memory_choose(const ckca_memory *memory, ckca_model *m, const ckca_data *joined,
                                       ckca_data **next, int64_t *seen) {
    ckca_context *ctx = m->ctx;
    const int old = ckca__memory_count(memory), count = joined->count, classes = m->classes;
    const ckca__store *from = joined->store;
    const size_t bytes = ckca__picture_bytes(from);
    /* per class: how many pictures there are, the place of its first one in sorted, how many of them are the memory's,
       how many are chosen */
    int *have = (int *)ckca__alloc(ctx, ckca__mul(sizeof(int), 4 * (size_t)classes + 2 * (size_t)count));
    int *first, *kept, *keep, *sorted, *chosen; /* the choice of class k starts at chosen[first[k]] */
    int i, k, round, at = 0, given = 0;
    ckca_data_desc desc;
    ckca__store *store = NULL;
    ckca_status status = CKCA_OK;
    if (!have) return ckca__fail(ctx, CKCA_ENOMEM, "memory: out of memory for %d pictures", count);
    first = have + classes;
    kept = first + classes;
    keep = kept + classes;
    sorted = keep + classes;
    chosen = sorted + count;
    for (i = 0; i < count; i++) {
        k = from->labels[joined->index[i]];
        have[k]++;
        if (i < old) kept[k]++;
    }
    for (k = 1; k < classes; k++) first[k] = first[k - 1] + have[k - 1];
    for (i = 0; i < count; i++) sorted[first[from->labels[joined->index[i]]]++] = i;
    for (k = 0; k < classes; k++) first[k] -= have[k];
    for (round = 0, i = -1; given < memory->size && i != given;
         round++) /* a place for every class, as long as any has */
        for (i = given, k = 0; k < classes && given < memory->size; k++)
            if (have[k] > round) keep[k]++, given++;
    for (k = 0; !status && k < classes; k++)
        if (keep[k])
            status =
                ckca__memory_herd(m, joined, sorted + first[k], have[k], kept[k], seen[k], keep[k], chosen + first[k]);
    memset(&desc, 0, sizeof desc);
    if (!status)
        status = ckca__store_create(ctx, &store, (size_t)given, from->height, from->width, from->channels, classes,
                                    (const char *const *)from->class_names, &desc);
    for (round = 0; !status && at < given; round++)
        for (k = 0; k < classes; k++) {
            if (keep[k] <= round) continue;
            store->labels[at] = k;
            i = chosen[first[k] + round];
            if (!status) status = ckca_copy_pixels(joined, i, store->pixels + (size_t)at++ * bytes);
        }
    if (!status) status = ckca__view(next, store, NULL, given);
    for (k = 0; !status && k < classes; k++) seen[k] += have[k] - kept[k];
    ckca__store_release(store);
    ckca__release(ctx, have);
    return status;
}

/* ---- taking in a chunk: the Fisher information ---- */

/* dlogits (n x k) = the gradient of mean_i -log p(y_i), y_i drawn from the softmax of logits (n x k): the draws of
   pictures index[0..n), a pure function of seed. */
static void ckca__fisher_gradient(int n, int k, const float *logits, uint64_t seed, const int *index, float *dlogits) {
    int i, j;
    for (i = 0; i < n; i++, logits += k, dlogits += k) {
        double total = 0, draw = ckca__uniform(seed, CKCA__STREAM_FISHER, (uint64_t)index[i]);
        float most = logits[0];
        int label = -1;
        for (j = 1; j < k; j++) most = logits[j] > most ? logits[j] : most;
        for (j = 0; j < k; j++) total += exp((double)logits[j] - (double)most);
        for (j = 0; j < k; j++) {
            const double p = exp((double)logits[j] - (double)most) / total;
            draw -= p;
            dlogits[j] = (float)(p / n);
            if (label < 0 && (draw < 0 || j == k - 1)) label = j;
        }
        dlogits[label] -= 1.0f / (float)n;
    }
}

/* Adds the chunk's Fisher information by m to fisher, on the device. */
static ckca_status ckca__memory_add_fisher(const ckca_model *m, const ckca_data *chunk, uint64_t seed, float *fisher) {
    ckca_context *ctx = m->ctx;
    const int count = chunk->count, n = count < CKCA__FISHER_BATCH ? count : CKCA__FISHER_BATCH, batches = count / n;
    const size_t picture = (size_t)m->height * (size_t)m->width * (size_t)m->channels, k = (size_t)m->classes;
    const size_t size = (size_t)n;
    ckca_model *copy = NULL; /* training mode moves running statistics: m keeps its own */
    int *order = (int *)ckca__alloc(ctx, (size_t)count * sizeof(int)), b;
    float *pictures =
        (float *)ckca__alloc(ctx, ckca__mul(ckca__sum(ckca__mul(picture, size), 2 * k * size), sizeof(float)));
    float *logits = pictures ? pictures + picture * size : NULL, *dlogits = logits ? logits + k * size : NULL;
    ckca_status status = CKCA_OK;
    if (!order || !pictures)
        status = ckca__fail(ctx, CKCA_ENOMEM, "memory: out of memory for the Fisher information of %d pictures", count);
    if (!status && !(status = ckca_model_copy(&copy, m))) { /* with a gradient for every layer, frozen or not */
        int i;
        for (i = 0; i < copy->nodes; i++) copy->node[i].rate = 1;
        ckca__layout_training(copy);
    }
    if (!status) ckca_shuffle(seed, 0, count, order); /* folders come class by class */
    for (b = 0; !status && b < batches; b++) {
        const int *index = order + (size_t)b * size;
        if ((status = ckca_get_batch(copy, chunk, index, n, NULL, 0, 0, pictures, NULL)) ||
            (status = ckca_forward(copy, pictures, n, 1)) || (status = ckca_node_read(copy, copy->logits, logits)))
            break;
        ckca__fisher_gradient(n, m->classes, logits, seed, index, dlogits);
        if ((status = ckca_zero_gradients(copy)) || (status = ckca_backward(copy, dlogits, NULL))) break;
        ckca__op_add_squares(ctx, copy->trainable, copy->gradients, (float)n / (float)batches, fisher);
    }
    if (!status) status = ckca__device_status(ctx);
    ckca_model_free(copy);
    ckca__release(ctx, pictures);
    ckca__release(ctx, order);
    return status;
}

/* Takes in a chunk: joined is the memory's pictures and the chunk, or the chunk if it has none. updates: of the model
   after the chunk's update. On failure the memory does not change. */
static ckca_status ckca__memory_refill(ckca_memory *memory, ckca_model *m, const ckca_data *chunk,
                                       const ckca_data *joined, int updates) {
    ckca_context *ctx = m->ctx;
    const size_t classes = (size_t)m->classes, bytes = memory->trainable * sizeof(float);
    ckca_data *data = NULL;
    int64_t *seen = NULL;
    float *fisher = NULL;
    ckca_status status = CKCA_OK;
    if (memory->fisher) {
        fisher = (float *)ckca__device_alloc(ctx, bytes);
        if (fisher) ckca__device_copy(ctx, fisher, memory->fisher, bytes);
        status = fisher ? ckca__memory_add_fisher(m, chunk, (uint64_t)updates, fisher)
                        : ckca__fail(ctx, CKCA_ENOMEM, "memory: out of memory for %.1f MB of Fisher information",
                                     (double)bytes * 1e-6);
    }
    if (!status && memory->size) {
        seen = (int64_t *)ckca__alloc(ctx, classes * sizeof *seen);
        if (seen) memcpy(seen, memory->seen, classes * sizeof *seen);
        status = seen ? ckca__memory_choose(memory, m, joined, &data, seen)
                      : ckca__fail(ctx, CKCA_ENOMEM, "memory: out of memory for %d classes", m->classes);
    }
    if (status) {
        ckca__device_release(ctx, fisher, bytes);
        ckca__release(ctx, seen);
        return status;
    }
    if (fisher) {
        ckca__device_release(ctx, memory->fisher, bytes);
        memory->fisher = fisher;
    }
    if (seen) {
        ckca__release(ctx, memory->seen);
        memory->seen = seen;
        ckca_data_free(memory->data);
        memory->data = data;
    }
    memory->updates = updates;
    return CKCA_OK;
}

CKCA_API ckca_status ckca_memory_fill(ckca_memory *memory, ckca_model *m, const ckca_data *chunk) {
    ckca_data *parts[2], *joined = NULL;
    ckca_status status;
    int had_names, was_normalized;
    if (!m) return CKCA_EINVAL;
    if (!memory || !chunk) return ckca__null(m->ctx, "ckca_memory_fill", !memory ? "memory" : "chunk");
    if ((status = ckca__check_finished(m, "ckca_memory_fill"))) return status;
    if (!m->updates)
        return ckca__fail(m->ctx, CKCA_EINVAL, "ckca_memory_fill: the model is untrained: its features choose nothing");
    had_names = m->class_names != NULL;
    was_normalized = m->normalized;
    if ((status = ckca__bind_data(m, chunk, "memory"))) return status;
    parts[0] = memory->data;
    parts[1] = (ckca_data *)chunk; /* only read */
    if (!(status = ckca__memory_check(memory, m)) && memory->data) status = ckca_join(&joined, parts, 2);
    if (!status) status = ckca__memory_refill(memory, m, chunk, joined ? joined : chunk, m->updates);
    if (status) ckca__unbind_data(m, had_names, was_normalized);
    ckca_data_free(joined);
    return status;
}

/* ---- creating, reading, writing ---- */

CKCA_API void ckca_memory_free(ckca_memory *memory) {
    if (!memory) return;
    ckca_data_free(memory->data);
    ckca__device_release(memory->ctx, memory->fisher, memory->trainable * sizeof(float));
    ckca__release(memory->ctx, memory->parameter);
    ckca__release(memory->ctx, memory->seen);
    ckca__release(memory->ctx, memory);
}

CKCA_API ckca_status ckca_memory_create(const ckca_model *m, ckca_memory **out, const ckca_memory_desc *desc) {
    ckca__bound bounds[2] = {{"pictures", 0, 0, CKCA__MEMORY_MOST, 0}, {"fisher", 0, 0, 1, 0}};
    ckca_memory *memory;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!out || !desc) return ckca__null(m->ctx, "ckca_memory_create", !out ? "memory" : "desc");
    bounds[0].value = desc->pictures;
    bounds[1].value = desc->fisher;
    if ((status = ckca__check_finished(m, "ckca_memory_create")) ||
        (status = ckca__check_bounds(m->ctx, "memory", bounds, 2)))
        return status;
    if (!desc->pictures && !desc->fisher)
        return ckca__fail(m->ctx, CKCA_EINVAL, "memory: pictures and fisher are 0: there is nothing to keep");
    if (desc->pictures && desc->pictures < m->classes)
        return ckca__fail(m->ctx, CKCA_EINVAL, "memory: pictures is %d, but it needs one per class, and there are %d",
                          desc->pictures, m->classes);
    memory = (ckca_memory *)ckca__alloc(m->ctx, sizeof *memory);
    if (!memory) return ckca__fail(m->ctx, CKCA_ENOMEM, "out of memory for a memory");
    memory->ctx = m->ctx;
    memory->size = desc->pictures;
    memory->height = m->height;
    memory->width = m->width;
    memory->channels = m->channels;
    memory->classes = m->classes;
    memory->parameters = m->parameters;
    memory->trainable = m->trainable;
    memory->seen = (int64_t *)ckca__alloc(m->ctx, (size_t)m->classes * sizeof *memory->seen);
    memory->parameter = (ckca__parameter *)ckca__alloc(m->ctx, (size_t)m->parameters * sizeof *m->parameter);
    if (desc->fisher) memory->fisher = (float *)ckca__device_alloc(m->ctx, m->trainable * sizeof(float));
    if (!memory->seen || !memory->parameter || (desc->fisher && !memory->fisher)) {
        ckca_memory_free(memory);
        return ckca__fail(m->ctx, CKCA_ENOMEM, "out of memory for a memory of %d classes and %.1f MB", m->classes,
                          desc->fisher ? (double)m->trainable * 4e-6 : 0);
    }
    memcpy(memory->parameter, m->parameter, (size_t)m->parameters * sizeof *m->parameter);
    if (memory->fisher) ckca__device_zero(m->ctx, memory->fisher, m->trainable * sizeof(float));
    *out = memory;
    return CKCA_OK;
}

CKCA_API void ckca_memory_info_get(const ckca_memory *memory, ckca_memory_info *info) {
    if (!info) return;
    memset(info, 0, sizeof *info);
    if (!memory) return;
    info->pictures = memory->size;
    info->fisher = memory->fisher != NULL;
    info->count = ckca__memory_count(memory);
    info->updates = memory->updates;
}

CKCA_API const ckca_data *ckca_memory_pictures(const ckca_memory *memory) { return memory ? memory->data : NULL; }

/* Reads the pictures of a memory's file into memory, which is new. */
static ckca_status ckca__memory_read_pictures(ckca_memory *memory, const ckca_model *m, const ckca__st_file *file) {
    const ckca__st_tensor *pictures = ckca__st_find(file, "pictures"), *labels = ckca__st_find(file, "labels");
    const ckca__st_tensor *seen = ckca__st_find(file, "seen");
    const char *path = ckca__tail(file->path), *json = ckca__st_meta(file, "ckca.class_names");
    const int64_t classes = memory->classes;
    const size_t size = (size_t)memory->classes * sizeof *memory->seen;
    int64_t *held = NULL, count;
    char has[200], **names = NULL;
    ckca__store *store = NULL;
    ckca_data_desc desc;
    ckca_status status = CKCA_OK;
    int i, listed = 0;
    if (!pictures || !labels || !seen || !json)
        return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: it lacks pictures, labels, seen or ckca.class_names", path);
    if (strcmp(pictures->dtype, "U8") || strcmp(labels->dtype, "I32") || strcmp(seen->dtype, "I64"))
        return ckca__fail(file->ctx, CKCA_EFORMAT,
                          "%s: pictures, labels and seen are %s, %s and %s, not U8, I32 and I64", path, pictures->dtype,
                          labels->dtype, seen->dtype);
    ckca__shape_text(pictures->shape, pictures->dims, has, sizeof has);
    if (pictures->dims != 4 || pictures->shape[1] != memory->height || pictures->shape[2] != memory->width ||
        pictures->shape[3] != memory->channels)
        return ckca__fail(file->ctx, CKCA_ESHAPE, "%s: its pictures are %s, the model takes Nx%dx%dx%d", path, has,
                          memory->height, memory->width, memory->channels);
    if (seen->dims != 1 || seen->shape[0] != classes)
        return ckca__fail(file->ctx, CKCA_ESHAPE, "%s: it has %.0f classes, the model has %d", path,
                          seen->dims == 1 ? (double)seen->shape[0] : 0, memory->classes);
    count = pictures->shape[0];
    if (count < 1 || count > memory->size || labels->dims != 1 || labels->shape[0] != count)
        return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: %.0f pictures with %.0f labels in a memory of at most %d", path,
                          (double)count, labels->dims == 1 ? (double)labels->shape[0] : 0, memory->size);
    if ((status = ckca__names_from_json(file->ctx, file->path, json, &names, &listed))) return status;
    if (listed != memory->classes)
        status =
            ckca__fail(file->ctx, CKCA_EFORMAT, "%s: %d class names for %d classes", path, listed, memory->classes);
    for (i = 0; !status && m->class_names && i < listed; i++)
        if (strcmp(names[i], m->class_names[i]))
            status =
                ckca__fail(file->ctx, CKCA_EINVAL, "%s: class %d is \"%.60s\" in the memory, \"%.60s\" in the model",
                           path, i, names[i], m->class_names[i]);
    memset(&desc, 0, sizeof desc);
    if (!status)
        status = ckca__store_create(file->ctx, &store, (size_t)count, memory->height, memory->width, memory->channels,
                                    memory->classes, (const char *const *)names, &desc);
    ckca__free_names(file->ctx, names, listed);
    if (status) return status;
    memcpy(store->pixels, file->bytes + pictures->begin, pictures->end - pictures->begin);
    memcpy(store->labels, file->bytes + labels->begin, labels->end - labels->begin);
    memcpy(memory->seen, file->bytes + seen->begin, size);
    held = (int64_t *)ckca__alloc(file->ctx, size);
    if (!held) status = ckca__fail(file->ctx, CKCA_ENOMEM, "%s: out of memory for %d classes", path, memory->classes);
    for (i = 0; !status && i < store->count; i++) {
        if (store->labels[i] < 0 || store->labels[i] >= memory->classes)
            status = ckca__fail(file->ctx, CKCA_EFORMAT, "%s: label %d is %d, must be 0 to %d", path, i,
                                store->labels[i], memory->classes - 1);
        else
            held[store->labels[i]]++;
    }
    for (i = 0; !status && i < memory->classes; i++)
        if (memory->seen[i] < held[i] || memory->seen[i] > (int64_t)1 << 52)
            status = ckca__fail(file->ctx, CKCA_EFORMAT, "%s: it has %.0f pictures of class %d, of %.0f that were seen",
                                path, (double)held[i], i, (double)memory->seen[i]);
    if (!status) status = ckca__view(&memory->data, store, NULL, store->count);
    ckca__release(file->ctx, held);
    ckca__store_release(store);
    return status;
}

/* Reads the Fisher information of a memory's file into memory, which is new. */
static ckca_status ckca__memory_read_fisher(ckca_memory *memory, const ckca_model *m, const ckca__st_file *file) {
    float *host = (float *)ckca__alloc(m->ctx, m->trainable * sizeof(float));
    size_t j;
    int i;
    ckca_status status = host ? ckca__read_parameters(m, file, "fisher.", 1, host)
                              : ckca__fail(m->ctx, CKCA_ENOMEM, "%s: out of memory for %.1f MB", ckca__tail(file->path),
                                           (double)m->trainable * 4e-6);
    for (i = 0; !status && i < m->parameters; i++) {
        const ckca__parameter *p = &m->parameter[i];
        for (j = 0; !status && p->role < CKCA__ROLE_MEAN && j < p->count; j++)
            if (host[p->offset + j] < 0)
                status = ckca__fail(m->ctx, CKCA_EFORMAT, "%s: fisher.%s has the negative value %g",
                                    ckca__tail(file->path), p->name, (double)host[p->offset + j]);
    }
    if (!status) {
        ckca__device_upload(m->ctx, memory->fisher, host, m->trainable * sizeof(float));
        status = ckca__device_status(m->ctx);
    }
    ckca__release(m->ctx, host);
    return status;
}

static ckca_status ckca__memory_read(const ckca_model *m, ckca_memory **out, const ckca__st_file *file) {
    const char *text = ckca__st_meta(file, "ckca.memory");
    ckca_memory *memory = NULL;
    ckca_memory_desc desc;
    int number[3], i; /* pictures, fisher, updates */
    size_t tensors = 0;
    ckca_status status;
    if ((status = ckca__check_format(file))) return status;
    if (!text) return ckca__fail(m->ctx, CKCA_EFORMAT, "%s: it is not a memory", ckca__tail(file->path));
    if (!ckca__parse_integers(text, number, 3) || number[0] > CKCA__MEMORY_MOST || number[1] > 1 ||
        !(number[0] || number[1]))
        return ckca__fail(m->ctx, CKCA_EFORMAT, "%s: ckca.memory \"%.40s\" cannot be read", ckca__tail(file->path),
                          text);
    if (number[0] && number[0] < m->classes)
        return ckca__fail(m->ctx, CKCA_ESHAPE,
                          "%s: it keeps %d pictures, but it needs one per class, and the model has %d",
                          ckca__tail(file->path), number[0], m->classes);
    desc.pictures = number[0];
    desc.fisher = number[1];
    if ((status = ckca_memory_create(m, &memory, &desc))) return status;
    memory->updates = number[2];
    if (memory->size && number[2]) {
        status = ckca__memory_read_pictures(memory, m, file);
        tensors = 3;
    }
    if (!status && memory->fisher) {
        status = ckca__memory_read_fisher(memory, m, file);
        for (i = 0; i < m->parameters; i++) tensors += m->parameter[i].role < CKCA__ROLE_MEAN;
    }
    if (!status && file->tensors != tensors)
        status = ckca__fail(m->ctx, CKCA_EFORMAT, "%s: it has %.0f tensors, a memory of this model has %.0f",
                            ckca__tail(file->path), (double)file->tensors, (double)tensors);
    if (status)
        ckca_memory_free(memory);
    else
        *out = memory;
    return status;
}

/* For ckca__memory_item. */
typedef struct ckca__memory_export {
    const ckca_memory *memory;
    const int *parameter;  /* of each item without data */
    float *host, *ordered; /* one tensor each */
} ckca__memory_export;

/* The values of item i, a tensor of the Fisher information in PyTorch's order. */
static const void *ckca__memory_item(void *user, int i) {
    const ckca__memory_export *e = (const ckca__memory_export *)user;
    const ckca__parameter *p = &e->memory->parameter[e->parameter[i]];
    ckca__device_download(e->memory->ctx, e->host, e->memory->fisher + p->offset, p->count * sizeof(float));
    ckca__reorder(p, e->host, e->ordered, 1);
    return e->ordered;
}

/* Writes a memory's file; path NULL: to memory, see ckca__st_write_memory. */
static ckca_status ckca__memory_write(const ckca_memory *memory, const char *path, void *out, size_t capacity,
                                      size_t *size) {
    ckca_context *ctx = memory->ctx;
    const size_t most_items = (size_t)memory->parameters + 3;
    const char *what = path ? ckca__tail(path) : "memory";
    ckca__st_item *item = (ckca__st_item *)ckca__alloc(ctx, most_items * sizeof *item);
    char(*name)[CKCA__NAME_MAX + 32] = (char(*)[CKCA__NAME_MAX + 32]) ckca__alloc(ctx, most_items * sizeof *name);
    int *parameter = (int *)ckca__alloc(ctx, most_items * sizeof *parameter);
    char *names = NULL, format[16], numbers[64];
    ckca__st_pair meta[4];
    ckca__memory_export export_;
    size_t most = 0;
    int i, k, items = 0, metas = 0;
    ckca_status status = CKCA_OK;
    for (i = 0; i < memory->parameters; i++)
        if (memory->parameter[i].count > most) most = memory->parameter[i].count;
    export_.memory = memory;
    export_.parameter = parameter;
    export_.host = (float *)ckca__alloc(ctx, most * sizeof(float));
    export_.ordered = (float *)ckca__alloc(ctx, most * sizeof(float));
    if (memory->data)
        names = ckca__names_to_json(ctx, (const char *const *)memory->data->store->class_names, memory->classes);
    if (!item || !name || !parameter || !export_.host || !export_.ordered || (memory->data && !names))
        status = ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for saving it", what);
    if (!status) {
        snprintf(format, sizeof format, "%d", CKCA__FORMAT);
        snprintf(numbers, sizeof numbers, "%d %d %d", memory->size, memory->fisher != NULL, memory->updates);
        meta[metas].key = "ckca.format", meta[metas++].value = format;
        meta[metas].key = "ckca.version", meta[metas++].value = CKCA_VERSION;
        meta[metas].key = "ckca.memory", meta[metas++].value = numbers;
        if (names) meta[metas].key = "ckca.class_names", meta[metas++].value = names;
        if (memory->data) {
            const ckca__store *store = memory->data->store;
            item[0].name = "pictures", item[0].dtype = "U8", item[0].dims = 4, item[0].data = store->pixels;
            item[0].shape[1] = store->height, item[0].shape[2] = store->width, item[0].shape[3] = store->channels;
            item[1].name = "labels", item[1].dtype = "I32", item[1].dims = 1, item[1].data = store->labels;
            item[0].shape[0] = item[1].shape[0] = store->count;
            item[2].name = "seen", item[2].dtype = "I64", item[2].dims = 1, item[2].data = memory->seen;
            item[2].shape[0] = memory->classes;
            items = 3;
        }
        for (i = 0; memory->fisher && i < memory->parameters; i++) {
            const ckca__parameter *p = &memory->parameter[i];
            if (p->role >= CKCA__ROLE_MEAN) continue;
            snprintf(name[items], sizeof *name, "fisher.%s", p->name);
            item[items].name = name[items];
            item[items].dtype = "F32";
            item[items].dims = p->dims;
            for (k = 0; k < p->dims; k++) item[items].shape[k] = p->shape[k];
            parameter[items++] = i;
        }
        if (!path)
            status =
                ckca__st_write_memory(ctx, out, capacity, size, item, items, meta, metas, ckca__memory_item, &export_);
#ifndef CKCA_NO_STDIO
        else
            status = ckca__st_write(ctx, path, item, items, meta, metas, ckca__memory_item, &export_);
#endif
    }
    ckca__release(ctx, names);
    ckca__release(ctx, export_.host);
    ckca__release(ctx, export_.ordered);
    ckca__release(ctx, parameter);
    ckca__release(ctx, name);
    ckca__release(ctx, item);
    return status;
}

CKCA_API ckca_status ckca_memory_to_bytes(ckca_memory *memory, void *out, size_t capacity, size_t *size) {
    if (!memory) return CKCA_EINVAL;
    if (!size) return ckca__null(memory->ctx, "ckca_memory_to_bytes", "size");
    *size = 0;
    return ckca__memory_write(memory, NULL, out, capacity, size);
}

CKCA_API ckca_status ckca_memory_from_bytes(const ckca_model *m, ckca_memory **out, const void *bytes, size_t size) {
    ckca__st_file file;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!out || !bytes) return ckca__null(m->ctx, "ckca_memory_from_bytes", !out ? "memory" : "bytes");
    if ((status = ckca__check_finished(m, "ckca_memory_from_bytes"))) return status;
    status = ckca__st_parse(m->ctx, "memory", (const unsigned char *)bytes, size, &file);
    if (!status) status = ckca__memory_read(m, out, &file);
    ckca__st_close(&file);
    return status;
}

#ifndef CKCA_NO_STDIO
CKCA_API ckca_status ckca_memory_save(ckca_memory *memory, const char *path) {
    if (!memory) return CKCA_EINVAL;
    if (!path) return ckca__null(memory->ctx, "ckca_memory_save", "path");
    return ckca__memory_write(memory, path, NULL, 0, NULL);
}

CKCA_API ckca_status ckca_memory_load(const ckca_model *m, ckca_memory **out, const char *path) {
    ckca__st_file file;
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!out || !path) return ckca__null(m->ctx, "ckca_memory_load", !out ? "memory" : "path");
    if ((status = ckca__check_finished(m, "ckca_memory_load"))) return status;
    status = ckca__st_open(m->ctx, path, &file);
    if (!status) status = ckca__memory_read(m, out, &file);
    ckca__st_close(&file);
    return status;
}
#endif

/* ===================================================================================================================
   SAFETENSORS                                                                                           >>safetensors

   A safetensors file is 8 bytes of header length (least significant first), a header in JSON, and the tensors' bytes:
   {"__metadata__":{"key":"text"},"conv1.weight":{"dtype":"F32","shape":[16,3,3,3],"data_offsets":[0,1728]}}
   Values are little-endian, as are all machines that this library runs on.
   =================================================================================================================== */

/* ---- a JSON parser for such headers ---- */

/* The state of the parser. Strings are unescaped in place, which never makes them longer. */
typedef struct ckca__json {
    ckca_context *ctx;
    const char *path; /* for messages */
    char *text;       /* size bytes and a zero */
    size_t at, size;  /* at: the next byte */
} ckca__json;

static ckca_status ckca__json_fail(const ckca__json *json, const char *expected) {
    return ckca__fail(json->ctx, CKCA_EFORMAT, "%s: %s at byte %.0f of %.0f of its JSON", ckca__tail(json->path),
                      expected, (double)json->at, (double)json->size);
}

/* Skips white space. */
static void ckca__json_space(ckca__json *json) {
    while (json->at < json->size && strchr(" \t\r\n", json->text[json->at]) && json->text[json->at]) json->at++;
}

/* Skips white space and consumes c if it comes next. Returns 0 otherwise. */
static int ckca__json_take(ckca__json *json, char c) {
    ckca__json_space(json);
    if (json->at >= json->size || json->text[json->at] != c) return 0;
    json->at++;
    return 1;
}

/* Parses the four hexadecimal digits of an escape; -1 if they are not there. */
static int ckca__json_hex(ckca__json *json) {
    int value = 0, i;
    if (json->size - json->at < 4) return -1;
    for (i = 0; i < 4; i++) {
        static const char digits[] = "0123456789abcdefABCDEF";
        char c = json->text[json->at + (size_t)i];
        const char *digit = c ? strchr(digits, c) : NULL;
        if (!digit) return -1;
        value = value * 16 + (int)(digit - digits) - (digit - digits > 15 ? 6 : 0);
    }
    json->at += 4;
    return value;
}

/* Parses a string; *string is its text without quotes, unescaped, with a final zero. string NULL: skips it, and it may
   contain \u0000. */
static ckca_status ckca__json_string(ckca__json *json, char **string) {
    char *out;
    if (!ckca__json_take(json, '"')) return ckca__json_fail(json, "expected a string");
    out = json->text + json->at;
    if (string) *string = out;
    for (;;) {
        static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
        unsigned char c;
        const char *escape;
        int code, low;
        if (json->at >= json->size) return ckca__json_fail(json, "an unterminated string");
        c = (unsigned char)json->text[json->at];
        if (c < 0x20) return ckca__json_fail(json, "a control character in a string");
        json->at++;
        if (c == '"') break;
        if (c != '\\') {
            *out++ = (char)c;
            continue;
        }
        c = json->at < json->size ? (unsigned char)json->text[json->at++] : 0;
        escape = c ? strchr(escapes, c) : NULL;
        if (escape) {
            *out++ = meant[escape - escapes];
            continue;
        }
        code = c == 'u' ? ckca__json_hex(json) : -1;
        if (code >= 0xd800 && code < 0xdc00) { /* a high surrogate; the low one must follow */
            low = -1;
            if (json->size - json->at >= 2 && json->text[json->at] == '\\' && json->text[json->at + 1] == 'u') {
                json->at += 2;
                low = ckca__json_hex(json);
            }
            code = low >= 0xdc00 && low < 0xe000 ? 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00) : -1;
        } else if (code >= 0xdc00 && code < 0xe000)
            code = -1;
        if (code < 0 || (code == 0 && string)) /* a C string cannot hold \u0000 */
            return ckca__json_fail(json, "an invalid escape");
        if (code < 0x80)
            *out++ = (char)code;
        else if (code < 0x800)
            *out++ = (char)(0xc0 | code >> 6);
        else if (code < 0x10000)
            *out++ = (char)(0xe0 | code >> 12);
        else
            *out++ = (char)(0xf0 | code >> 18);
        if (code >= 0x10000) *out++ = (char)(0x80 | (code >> 12 & 63));
        if (code >= 0x800) *out++ = (char)(0x80 | (code >> 6 & 63));
        if (code >= 0x80) *out++ = (char)(0x80 | (code & 63));
    }
    *out = 0;
    return CKCA_OK;
}

/* Parses a whole number from 0 to 2^63 - 1. */
static ckca_status ckca__json_integer(ckca__json *json, int64_t *value) {
    size_t first;
    ckca__json_space(json);
    first = json->at;
    *value = 0;
    while (json->at < json->size && json->text[json->at] >= '0' && json->text[json->at] <= '9') {
        int digit = json->text[json->at] - '0';
        if (*value > (INT64_MAX - digit) / 10) return ckca__json_fail(json, "a number beyond 2^63 - 1");
        *value = *value * 10 + digit;
        json->at++;
    }
    if (json->at == first || (json->at > first + 1 && json->text[first] == '0'))
        return ckca__json_fail(json, "expected a whole number");
    return CKCA_OK;
}

/* Parses a list of up to most whole numbers. */
static ckca_status ckca__json_integers(ckca__json *json, int64_t *values, int most, int *count) {
    ckca_status status = CKCA_OK;
    *count = 0;
    if (!ckca__json_take(json, '[')) return ckca__json_fail(json, "expected a list");
    if (ckca__json_take(json, ']')) return CKCA_OK;
    do {
        if (*count == most) return ckca__json_fail(json, "a list that is too long");
        status = ckca__json_integer(json, &values[(*count)++]);
    } while (!status && ckca__json_take(json, ','));
    if (!status && !ckca__json_take(json, ']')) return ckca__json_fail(json, "expected , or ]");
    return status;
}

/* Skips digits; returns how many. */
static size_t ckca__json_digits(ckca__json *json) {
    const size_t first = json->at;
    while (json->at < json->size && json->text[json->at] >= '0' && json->text[json->at] <= '9') json->at++;
    return json->at - first;
}

/* Skips one value of any kind. Lists and objects nest up to 125 deep, as in serde_json. */
static ckca_status ckca__json_skip(ckca__json *json, int depth) {
    static const char *const words[] = {"null", "true", "false"};
    ckca_status status = CKCA_OK;
    size_t first, n;
    char c;
    int i, ok;
    ckca__json_space(json);
    c = json->at < json->size ? json->text[json->at] : 0;
    if (c == '"') return ckca__json_string(json, NULL);
    if (c == '[' || c == '{') {
        const char end = c == '[' ? ']' : '}';
        if (depth == 125) return ckca__json_fail(json, "values nested too deeply");
        json->at++;
        if (ckca__json_take(json, end)) return CKCA_OK;
        do {
            if (c == '{') status = ckca__json_string(json, NULL);
            if (!status && c == '{' && !ckca__json_take(json, ':')) status = ckca__json_fail(json, "expected :");
            if (!status) status = ckca__json_skip(json, depth + 1);
        } while (!status && ckca__json_take(json, ','));
        if (!status && !ckca__json_take(json, end))
            status = ckca__json_fail(json, "expected , or the end of the value");
        return status;
    }
    for (i = 0; i < 3; i++) {
        n = strlen(words[i]);
        if (json->size - json->at < n || memcmp(json->text + json->at, words[i], n)) continue;
        json->at += n;
        return CKCA_OK;
    }
    if (c == '-') json->at++; /* a number; the final zero of the text ends it */
    first = json->at;
    n = ckca__json_digits(json);
    ok = n == 1 || (n > 1 && json->text[first] != '0');
    if (ok && json->text[json->at] == '.') {
        json->at++;
        ok = ckca__json_digits(json) > 0;
    }
    if (ok && (json->text[json->at] == 'e' || json->text[json->at] == 'E')) {
        json->at++;
        if (json->text[json->at] == '-' || json->text[json->at] == '+') json->at++;
        ok = ckca__json_digits(json) > 0;
    }
    return ok ? CKCA_OK : ckca__json_fail(json, "expected a value");
}

/* The index of the first byte that is not valid UTF-8 (Unicode 15, table 3-7), or size. */
static size_t ckca__utf8_flaw(const unsigned char *text, size_t size) {
    size_t i = 0, n, k;
    for (; i < size; i += n) {
        unsigned char c = text[i], low = 0x80, high = 0xbf; /* bounds of the second byte */
        n = c < 0x80 ? 1 : c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
        if (n == 0 || n > size - i) return i;
        if (c == 0xe0) low = 0xa0;
        if (c == 0xed) high = 0x9f; /* no surrogates */
        if (c == 0xf0) low = 0x90;
        if (c == 0xf4) high = 0x8f;
        for (k = 1; k < n; k++, low = 0x80, high = 0xbf)
            if (text[i + k] < low || text[i + k] > high) return i;
    }
    return size;
}

/* ---- growing text, JSON strings and lists ---- */

/* Appends n bytes. */
static void ckca__text_add(ckca__text *text, const char *bytes, size_t n) {
    size_t need = ckca__sum(ckca__sum(text->length, n), 1);
    if (need > text->capacity && !text->failed) {
        size_t capacity = need > 256 ? ckca__mul(need, 2) : 512;
        char *grown = (char *)ckca__alloc(text->ctx, capacity);
        if (grown && text->length) memcpy(grown, text->bytes, text->length);
        if (grown) {
            ckca__release(text->ctx, text->bytes);
            text->bytes = grown;
            text->capacity = capacity;
        } else
            text->failed = 1;
    }
    if (text->failed) return;
    memcpy(text->bytes + text->length, bytes, n);
    text->length += n;
    text->bytes[text->length] = 0;
}

static void ckca__text_puts(ckca__text *text, const char *string) { ckca__text_add(text, string, strlen(string)); }

static void ckca__text_number(ckca__text *text, uint64_t value) {
    char digits[24];
    int i = sizeof digits;
    do digits[--i] = (char)('0' + value % 10);
    while (value /= 10);
    ckca__text_add(text, digits + i, sizeof digits - (size_t)i);
}

/* Appends a JSON string, quoted and escaped. Bytes that are not UTF-8 (a folder's name may have any) become U+FFFD. */
static void ckca__text_json(ckca__text *text, const char *string) {
    const unsigned char *s = (const unsigned char *)string;
    size_t i, n = strlen(string), good = ckca__utf8_flaw(s, n);
    char escape[8];
    ckca__text_add(text, "\"", 1);
    for (i = 0; i < n; i++) {
        if (i == good) {
            ckca__text_puts(text, "\xef\xbf\xbd");
            good = i + 1 + ckca__utf8_flaw(s + i + 1, n - i - 1);
        } else if (s[i] == '"' || s[i] == '\\') {
            escape[0] = '\\';
            escape[1] = (char)s[i];
            ckca__text_add(text, escape, 2);
        } else if (s[i] < 0x20) {
            snprintf(escape, sizeof escape, "\\u%04x", s[i]);
            ckca__text_add(text, escape, 6);
        } else
            ckca__text_add(text, string + i, 1);
    }
    ckca__text_add(text, "\"", 1);
}

/* n strings as a JSON list, ["cat","dog"], which the caller releases. NULL if out of memory. */
static char *ckca__names_to_json(ckca_context *ctx, const char *const *names, int n) {
    ckca__text text;
    int i;
    memset(&text, 0, sizeof text);
    text.ctx = ctx;
    ckca__text_add(&text, "[", 1);
    for (i = 0; i < n; i++) {
        if (i) ckca__text_add(&text, ",", 1);
        ckca__text_json(&text, names[i]);
    }
    ckca__text_add(&text, "]", 1);
    if (!text.failed) return text.bytes;
    ckca__release(ctx, text.bytes);
    return NULL;
}

/* Parses such a list; the caller frees *names with ckca__free_names. path is for messages. */
static ckca_status ckca__names_from_json(ckca_context *ctx, const char *path, const char *text, char ***names, int *n) {
    ckca__json json;
    char **found = NULL, *string;
    const char **view = NULL;
    size_t count = 0, capacity = 0;
    ckca_status status = CKCA_OK;
    *names = NULL;
    *n = 0;
    json.ctx = ctx;
    json.path = path;
    json.at = 0;
    json.size = strlen(text);
    json.text = (char *)ckca__alloc(ctx, json.size + 1);
    if (!json.text) return ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for its class names", ckca__tail(path));
    memcpy(json.text, text, json.size);
    if (ckca__utf8_flaw((unsigned char *)json.text, json.size) < json.size)
        status = ckca__json_fail(&json, "not UTF-8");
    else if (!ckca__json_take(&json, '['))
        status = ckca__json_fail(&json, "expected a list of class names");
    else if (!ckca__json_take(&json, ']')) {
        do {
            status = ckca__json_string(&json, &string);
            if (!status && (count >= INT_MAX || !ckca__grow(ctx, (void **)&view, count, &capacity, sizeof *view)))
                status = ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for its class names", ckca__tail(path));
            if (!status) view[count++] = string;
        } while (!status && ckca__json_take(&json, ','));
        if (!status && !ckca__json_take(&json, ']')) status = ckca__json_fail(&json, "expected , or ]");
    }
    ckca__json_space(&json);
    if (!status && json.at != json.size) status = ckca__json_fail(&json, "text after the list");
    if (!status) {
        found = ckca__copy_names(ctx, view, (int)count);
        if (!found) status = ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for its class names", ckca__tail(path));
    }
    ckca__release(ctx, view);
    ckca__release(ctx, json.text);
    *names = found;
    *n = found ? (int)count : 0;
    return status;
}

/* ---- reading ---- */

static void ckca__st_close(ckca__st_file *file) {
    ckca__release(file->ctx, file->tensor);
    ckca__release(file->ctx, file->meta);
    ckca__release(file->ctx, file->text);
    ckca__release(file->ctx, file->owned);
    file->tensor = NULL;
    file->meta = NULL;
    file->text = NULL;
    file->owned = NULL;
    file->tensors = file->metas = 0;
}

/* Bytes of one value, 0 for an unknown type. */
static size_t ckca__st_value_bytes(const char *dtype) {
    static const struct {
        char name[8];
        size_t bytes;
    } known[] = {{"F32", 4},  {"F64", 8}, {"F16", 2},     {"BF16", 2},   {"I64", 8}, {"U64", 8},
                 {"I32", 4},  {"U32", 4}, {"I16", 2},     {"U16", 2},    {"I8", 1},  {"U8", 1},
                 {"BOOL", 1}, {"C64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    size_t i;
    for (i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].name, dtype)) return known[i].bytes;
    return 0;
}

static int ckca__st_by_name(const void *a, const void *b) {
    return strcmp(((const ckca__st_tensor *)a)->name, ((const ckca__st_tensor *)b)->name);
}

static int ckca__st_by_place(const void *a, const void *b) {
    const ckca__st_tensor *x = (const ckca__st_tensor *)a, *y = (const ckca__st_tensor *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int ckca__st_by_key(const void *a, const void *b) {
    return strcmp(((const ckca__st_pair *)a)->key, ((const ckca__st_pair *)b)->key);
}

/* Parses {"key":"value",...}, the value of "__metadata__". */
static ckca_status ckca__st_parse_meta(ckca__json *json, ckca__st_file *file, size_t *capacity) {
    ckca_status status = CKCA_OK;
    if (!ckca__json_take(json, '{')) return ckca__json_fail(json, "__metadata__ is not an object");
    if (ckca__json_take(json, '}')) return CKCA_OK;
    do {
        char *key, *value;
        status = ckca__json_string(json, &key);
        if (!status && !ckca__json_take(json, ':')) status = ckca__json_fail(json, "expected :");
        if (!status) status = ckca__json_string(json, &value);
        if (!status && !ckca__grow(json->ctx, (void **)&file->meta, file->metas, capacity, sizeof *file->meta))
            status = ckca__fail(json->ctx, CKCA_ENOMEM, "%s: out of memory for its metadata", ckca__tail(json->path));
        if (status) return status;
        file->meta[file->metas].key = key;
        file->meta[file->metas++].value = value;
    } while (ckca__json_take(json, ','));
    return ckca__json_take(json, '}') ? CKCA_OK : ckca__json_fail(json, "expected , or }");
}

/* Parses a tensor: {"dtype":...,"shape":[...],"data_offsets":[begin,end]}, in any order. Like the reference
   implementation, skips other fields. */
static ckca_status ckca__st_parse_tensor(ckca__json *json, ckca__st_tensor *tensor) {
    int64_t offset[2];
    int offsets = 0, have_dtype = 0, have_shape = 0, i;
    size_t value_bytes, bytes;
    ckca_status status = CKCA_OK;
    if (!ckca__json_take(json, '{')) return ckca__json_fail(json, "a tensor that is not an object");
    do {
        char *key, *dtype;
        status = ckca__json_string(json, &key);
        if (!status && !ckca__json_take(json, ':')) status = ckca__json_fail(json, "expected :");
        if (status) return status;
        if (!strcmp(key, "dtype") && !have_dtype) {
            have_dtype = 1;
            status = ckca__json_string(json, &dtype);
            if (!status && !ckca__st_value_bytes(dtype))
                status = ckca__fail(json->ctx, CKCA_EFORMAT, "%s: %.100s has the unknown type \"%.20s\"",
                                    ckca__tail(json->path), tensor->name, dtype);
            if (!status) memcpy(tensor->dtype, dtype, strlen(dtype) + 1);
        } else if (!strcmp(key, "shape") && !have_shape) {
            have_shape = 1;
            status = ckca__json_integers(json, tensor->shape, 8, &tensor->dims);
        } else if (!strcmp(key, "data_offsets") && !offsets) {
            status = ckca__json_integers(json, offset, 2, &offsets);
        } else if (!strcmp(key, "dtype") || !strcmp(key, "shape") || !strcmp(key, "data_offsets")) {
            status = ckca__json_fail(json, "a duplicate field of a tensor");
        } else
            status = ckca__json_skip(json, 0);
        if (status) return status;
    } while (ckca__json_take(json, ','));
    if (!ckca__json_take(json, '}')) return ckca__json_fail(json, "expected , or }");
    if (!have_dtype || !have_shape || offsets != 2)
        return ckca__fail(json->ctx, CKCA_EFORMAT, "%s: %.100s lacks its dtype, shape or two data_offsets",
                          ckca__tail(json->path), tensor->name);
    bytes = value_bytes = ckca__st_value_bytes(tensor->dtype);
    for (i = 0; i < tensor->dims; i++)
        bytes = (uint64_t)tensor->shape[i] > SIZE_MAX ? SIZE_MAX : ckca__mul(bytes, (size_t)tensor->shape[i]);
    if (offset[1] < offset[0] || bytes == SIZE_MAX || (uint64_t)(offset[1] - offset[0]) != bytes)
        return ckca__fail(json->ctx, CKCA_EFORMAT,
                          "%s: %.100s is at bytes %.0f to %.0f, its shape and type (%.0f bytes a value) need %.0f",
                          ckca__tail(json->path), tensor->name, (double)offset[0], (double)offset[1],
                          (double)value_bytes, (double)bytes);
    tensor->begin = (size_t)offset[0];
    tensor->end = (size_t)offset[1];
    return CKCA_OK;
}

/* Parses the whole header. */
static ckca_status ckca__st_parse_header(ckca__json *json, ckca__st_file *file) {
    size_t tensor_capacity = 0, meta_capacity = 0;
    int have_meta = 0;
    ckca_status status;
    if (!json->size || json->text[0] != '{') return ckca__json_fail(json, "expected {");
    json->at = 1;
    if (!ckca__json_take(json, '}')) {
        do {
            char *name;
            status = ckca__json_string(json, &name);
            if (!status && !ckca__json_take(json, ':')) status = ckca__json_fail(json, "expected :");
            if (status) return status;
            if (!strcmp(name, "__metadata__")) {
                if (have_meta++) return ckca__json_fail(json, "a second __metadata__");
                ckca__json_space(json);
                status = json->text[json->at] == 'n' ? ckca__json_skip(json, 0) /* null: no metadata */
                                                     : ckca__st_parse_meta(json, file, &meta_capacity);
            } else if (!ckca__grow(json->ctx, (void **)&file->tensor, file->tensors, &tensor_capacity,
                                   sizeof *file->tensor)) {
                status = ckca__fail(json->ctx, CKCA_ENOMEM, "%s: out of memory for its header", ckca__tail(json->path));
            } else {
                file->tensor[file->tensors].name = name;
                status = ckca__st_parse_tensor(json, &file->tensor[file->tensors++]);
            }
            if (status) return status;
        } while (ckca__json_take(json, ','));
        if (!ckca__json_take(json, '}')) return ckca__json_fail(json, "expected , or }");
    }
    ckca__json_space(json);
    return json->at == json->size ? CKCA_OK : ckca__json_fail(json, "text after the last }");
}

/* Checks that the tensors fill the file after the header, without gaps or overlaps, and that names and keys are unique.
   data: where the header ends; size: of the file. */
static ckca_status ckca__st_check(ckca__st_file *file, size_t data, size_t size) {
    size_t i, at = 0;
    if (file->tensors) qsort(file->tensor, file->tensors, sizeof *file->tensor, ckca__st_by_place);
    for (i = 0; i < file->tensors; i++) {
        ckca__st_tensor *tensor = &file->tensor[i];
        if (tensor->begin != at || tensor->end > size - data)
            return ckca__fail(file->ctx, CKCA_EFORMAT,
                              "%s: %.100s is at bytes %.0f to %.0f of %.0f, the tensor before it ends at %.0f%s",
                              ckca__tail(file->path), tensor->name, (double)tensor->begin, (double)tensor->end,
                              (double)(size - data), (double)at, tensor->begin == at ? " (truncated?)" : "");
        at = tensor->end;
        tensor->begin += data;
        tensor->end += data;
    }
    if (at != size - data)
        return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: its tensors take %.0f bytes, but %.0f follow the header",
                          ckca__tail(file->path), (double)at, (double)(size - data));
    if (file->tensors) qsort(file->tensor, file->tensors, sizeof *file->tensor, ckca__st_by_name);
    for (i = 1; i < file->tensors; i++)
        if (!strcmp(file->tensor[i - 1].name, file->tensor[i].name))
            return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: %.100s appears twice", ckca__tail(file->path),
                              file->tensor[i].name);
    if (file->metas) qsort(file->meta, file->metas, sizeof *file->meta, ckca__st_by_key);
    for (i = 1; i < file->metas; i++)
        if (!strcmp(file->meta[i - 1].key, file->meta[i].key))
            return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: the metadata \"%.100s\" appears twice",
                              ckca__tail(file->path), file->meta[i].key);
    return CKCA_OK;
}

/* Parses a file in memory. bytes and path (for messages) must outlive *file. Call ckca__st_close, also after a failure. */
static ckca_status ckca__st_parse(ckca_context *ctx, const char *path, const unsigned char *bytes, size_t size,
                                  ckca__st_file *file) {
    uint64_t header = 0;
    size_t flaw;
    ckca__json json;
    ckca_status status;
    int i;
    memset(file, 0, sizeof *file);
    file->ctx = ctx;
    file->path = path;
    file->bytes = bytes;
    if (size < 8)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: %.0f bytes, a safetensors file has at least 10", ckca__tail(path),
                          (double)size);
    for (i = 7; i >= 0; i--) header = header << 8 | bytes[i];
    if (header > 100000000 || header > size - 8)
        return ckca__fail(ctx, CKCA_EFORMAT, "%s: a header of %.0f bytes in a file of %.0f: %s", ckca__tail(path),
                          (double)header, (double)size,
                          header > 100000000 ? "not a safetensors file" : "truncated, or not a safetensors file");
    memset(&json, 0, sizeof json);
    json.ctx = ctx;
    json.path = path;
    json.size = (size_t)header;
    json.text = file->text = (char *)ckca__alloc(ctx, json.size + 1);
    if (!json.text)
        return ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for its header of %.0f bytes", ckca__tail(path),
                          (double)header);
    memcpy(json.text, bytes + 8, json.size);
    flaw = ckca__utf8_flaw(bytes + 8, json.size);
    if (flaw < json.size) {
        json.at = flaw;
        status = ckca__json_fail(&json, "not UTF-8");
    } else
        status = ckca__st_parse_header(&json, file);
    if (!status) status = ckca__st_check(file, 8 + json.size, size);
    return status;
}

static const ckca__st_tensor *ckca__st_find(const ckca__st_file *file, const char *name) {
    ckca__st_tensor wanted;
    wanted.name = name;
    if (!file->tensors) return NULL;
    return (const ckca__st_tensor *)bsearch(&wanted, file->tensor, file->tensors, sizeof wanted, ckca__st_by_name);
}

/* The metadata's value of a key, or NULL. */
static const char *ckca__st_meta(const ckca__st_file *file, const char *key) {
    ckca__st_pair wanted, *found;
    wanted.key = key;
    if (!file->metas) return NULL;
    found = (ckca__st_pair *)bsearch(&wanted, file->meta, file->metas, sizeof wanted, ckca__st_by_key);
    return found ? found->value : NULL;
}

/* A half-precision number (IEEE 754 binary16) as a float. */
static float ckca__float16(unsigned bits) {
    unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value;
    if (exponent == 31)
        value = fraction ? NAN : INFINITY;
    else if (exponent)
        value = ldexpf((float)(1024 + fraction), (int)exponent - 25);
    else
        value = ldexpf((float)fraction, -24);
    return bits >> 15 ? -value : value;
}

/* Converts a tensor of F32, F16, BF16 or F64 to floats; out has as many as the product of its shape. */
static ckca_status ckca__st_read_floats(const ckca__st_file *file, const ckca__st_tensor *tensor, float *out) {
    const unsigned char *in = file->bytes + tensor->begin;
    size_t size = tensor->end - tensor->begin, i;
    if (!strcmp(tensor->dtype, "F32")) {
        if (size) memcpy(out, in, size);
    } else if (!strcmp(tensor->dtype, "F64")) {
        for (i = 0; i < size / 8; i++) {
            double value;
            memcpy(&value, in + i * 8, 8);
            out[i] = (float)value;
        }
    } else if (!strcmp(tensor->dtype, "F16")) {
        for (i = 0; i < size / 2; i++) out[i] = ckca__float16(in[2 * i] | (unsigned)in[2 * i + 1] << 8);
    } else if (!strcmp(tensor->dtype, "BF16")) { /* the upper 16 bits of a float */
        for (i = 0; i < size / 2; i++) {
            uint32_t bits = (uint32_t)in[2 * i] << 16 | (uint32_t)in[2 * i + 1] << 24;
            memcpy(&out[i], &bits, 4);
        }
    } else {
        return ckca__fail(file->ctx, CKCA_EFORMAT, "%s: %.100s has the type %s, not a float type",
                          ckca__tail(file->path), tensor->name, tensor->dtype);
    }
    return CKCA_OK;
}

#ifndef CKCA_NO_STDIO
/* Reads a whole file, 16 GiB at most, and parses it. path must outlive *file. Call ckca__st_close, also after a failure. */
static ckca_status ckca__st_open(ckca_context *ctx, const char *path, ckca__st_file *file) {
    unsigned char *bytes;
    size_t size;
    ckca_status status;
    memset(file, 0, sizeof *file);
    file->ctx = ctx;
    status = ckca__read_file(ctx, path, SIZE_MAX >> (sizeof(size_t) > 4 ? 30 : 1), &bytes, &size);
    if (status) return status;
    status = ckca__st_parse(ctx, path, bytes, size, file);
    file->owned = bytes;
    return status;
}
#endif /* CKCA_NO_STDIO */

/* ---- writing ---- */
static size_t ckca__st_item_bytes(const ckca__st_item *item) {
    size_t bytes = ckca__st_value_bytes(item->dtype);
    int i;
    for (i = 0; i < item->dims; i++) bytes *= (size_t)item->shape[i];
    return bytes;
}

/* Appends the header, padded with spaces to a multiple of 8. Tensors of wider types come first, so all are aligned. */
static void ckca__st_header(ckca__text *text, const ckca__st_item *items, int count, const ckca__st_pair *meta,
                            int metas) {
    size_t at = 0, width;
    int i, k, written = 0;
    ckca__text_puts(text, "{");
    for (i = 0; i < metas; i++) {
        ckca__text_puts(text, i ? "," : "\"__metadata__\":{");
        ckca__text_json(text, meta[i].key);
        ckca__text_puts(text, ":");
        ckca__text_json(text, meta[i].value);
        if (i == metas - 1) ckca__text_puts(text, "}");
    }
    for (width = 8; width; width /= 2) {
        for (i = 0; i < count; i++) {
            if (ckca__st_value_bytes(items[i].dtype) != width) continue;
            if (metas || written++) ckca__text_puts(text, ",");
            ckca__text_json(text, items[i].name);
            ckca__text_puts(text, ":{\"dtype\":");
            ckca__text_json(text, items[i].dtype);
            ckca__text_puts(text, ",\"shape\":[");
            for (k = 0; k < items[i].dims; k++) {
                if (k) ckca__text_puts(text, ",");
                ckca__text_number(text, (uint64_t)items[i].shape[k]);
            }
            ckca__text_puts(text, "],\"data_offsets\":[");
            ckca__text_number(text, at);
            ckca__text_puts(text, ",");
            ckca__text_number(text, at += ckca__st_item_bytes(&items[i]));
            ckca__text_puts(text, "]}");
        }
    }
    ckca__text_puts(text, "}");
    while (text->length % 8 && !text->failed) ckca__text_puts(text, " ");
}

/* Where ckca__st_write_all writes: to a file, or to memory that is large enough. */
typedef struct ckca__sink {
    FILE *file; /* NULL: memory */
    unsigned char *memory;
    size_t at; /* bytes written to memory */
} ckca__sink;

static int ckca__sink_write(ckca__sink *sink, const void *bytes, size_t size) {
#ifndef CKCA_NO_STDIO
    if (sink->file) return fwrite(bytes, 1, size, sink->file) == size;
#endif
    if (size) memcpy(sink->memory + sink->at, bytes, size);
    sink->at += size;
    return 1;
}

/* Writes length, header and tensors. If an item has no data, fetch(user, i) returns a pointer to its values, valid until
   the next call, so that a caller who must convert tensors needs memory for only one. Returns 0 if a write fails. */
static int ckca__st_write_all(ckca__sink *sink, const ckca__text *header, const ckca__st_item *items, int count,
                              const void *(*fetch)(void *user, int i), void *user) {
    unsigned char length[8];
    size_t width;
    int i, ok;
    for (i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header->length >> 8 * i);
    ok = ckca__sink_write(sink, length, 8) && ckca__sink_write(sink, header->bytes, header->length);
    for (width = 8; width; width /= 2) {
        for (i = 0; i < count && ok; i++) {
            const size_t bytes = ckca__st_item_bytes(&items[i]);
            if (ckca__st_value_bytes(items[i].dtype) != width || !bytes) continue;
            ok = ckca__sink_write(sink, items[i].data ? items[i].data : fetch(user, i), bytes);
        }
    }
    return ok;
}

/* Writes the bytes of a file to out, which has capacity bytes, and sets *size to their number. out NULL: only sets
   *size. */
static ckca_status ckca__st_write_memory(ckca_context *ctx, void *out, size_t capacity, size_t *size,
                                         const ckca__st_item *items, int count, const ckca__st_pair *meta, int metas,
                                         const void *(*fetch)(void *user, int i), void *user) {
    ckca__text header;
    ckca__sink sink;
    ckca_status status = CKCA_OK;
    int i;
    memset(&header, 0, sizeof header);
    header.ctx = ctx;
    ckca__st_header(&header, items, count, meta, metas);
    *size = ckca__sum(header.length, 8);
    for (i = 0; i < count; i++) *size = ckca__sum(*size, ckca__st_item_bytes(&items[i]));
    if (header.failed) {
        *size = 0;
        status = ckca__fail(ctx, CKCA_ENOMEM, "save: out of memory for its header");
    } else if (out && capacity < *size) {
        status = ckca__fail(ctx, CKCA_EINVAL, "save: out has %.0f bytes, the model needs %.0f", (double)capacity,
                            (double)*size);
    } else if (out) {
        memset(&sink, 0, sizeof sink);
        sink.memory = (unsigned char *)out;
        ckca__st_write_all(&sink, &header, items, count, fetch, user);
        status = ckca__device_status(ctx); /* a failed download */
    }
    ckca__release(ctx, header.bytes);
    return status;
}

#ifndef CKCA_NO_STDIO
#ifdef CKCA__POSIX
#include <sys/file.h>
#ifndef __cplusplus /* strict C99 hides these POSIX functions */
extern int fileno(FILE *);
extern int fsync(int);
extern char *realpath(const char *, char *);
#endif
#ifdef O_NOFOLLOW
#define CKCA__NOFOLLOW O_NOFOLLOW /* a PATH.tmp that is a link could lead anywhere */
#else
#define CKCA__NOFOLLOW 0
#endif
/* Opens the file at path, creates it if needed, and locks it until this process closes it or ends. Returns -1 if it cannot
   be opened (errno), -2 if it is locked. On a file system without locks it always succeeds. */
static int ckca__lock_path(const char *path) {
    struct stat mine, there;
    int tries;
    for (tries = 0; tries < 100; tries++) {
        int file = open(path, O_RDWR | O_CREAT | CKCA__NOFOLLOW, 0666);
        if (file < 0) return -1;
        fcntl(file, F_SETFD, FD_CLOEXEC);
        if (flock(file, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
            close(file);
            return -2;
        }
        /* The previous holder may have renamed or removed the file after it was opened here: then try again. */
        if (!fstat(file, &mine) && !stat(path, &there) && mine.st_dev == there.st_dev && mine.st_ino == there.st_ino)
            return file;
        close(file);
    }
    errno = EBUSY;
    return -1;
}
#endif

/* Writes a file: to PATH.tmp, which is synced to disk and then renamed to path. Overwrites the PATH.tmp of a killed run;
   PATH.tmp is locked while it is written. write(sink, user) writes what the file holds; it returns 0 if a write fails. */
static ckca_status ckca__write_path(ckca_context *ctx, const char *path, int (*write)(ckca__sink *sink, void *user),
                                    void *user) {
    ckca__text temporary;
    const char *failed = NULL; /* "created", "written", ...: for the message */
    const char *target = path;
    ckca__sink sink;
    ckca_status status = CKCA_OK;
    int error = 0, lock = -1;
#ifdef CKCA__POSIX
    char *resolved;
    struct stat about;
    int replaces = 0;
#endif
    memset(&sink, 0, sizeof sink);
    memset(&temporary, 0, sizeof temporary);
    temporary.ctx = ctx;
#ifdef CKCA__POSIX
    if ((resolved = realpath(path, NULL)) != NULL) { /* the file that a link leads to, not the link, is replaced */
        target = resolved;
        replaces = !stat(target, &about);
        if (replaces && !S_ISREG(about.st_mode)) {
            free(resolved);
            return ckca__fail(ctx, CKCA_EIO, "%s: not a regular file", ckca__tail(path));
        }
    }
#endif
    ckca__text_puts(&temporary, target);
    ckca__text_puts(&temporary, ".tmp");
    if (temporary.failed) {
        status = ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for its path", ckca__tail(path));
    } else {
#ifdef CKCA__POSIX
        lock = ckca__lock_path(temporary.bytes);
        if (lock == -2)
            status =
                ckca__fail(ctx, CKCA_EIO, "%s: another process is writing it (its .tmp is locked)", ckca__tail(path));
        else if (lock >= 0)
#endif
            sink.file = fopen(temporary.bytes, "wb");
        if (!sink.file && !status) {
            failed = "created";
            error = errno;
        }
    }
    if (sink.file) {
        int ok = write(&sink, user);
        if (ok) ok = !(status = ckca__device_status(ctx)) && fflush(sink.file) == 0;
#ifdef CKCA__POSIX
        ok = ok && fsync(fileno(sink.file)) == 0;
#endif
        if (!ok) error = errno;
        if (fclose(sink.file) != 0 && ok) {
            ok = 0;
            error = errno;
        }
        if (!ok) failed = "written";
#ifdef _WIN32
        if (ok) remove(path); /* on Windows rename does not replace a file */
#endif
#ifdef CKCA__POSIX
        if (ok && replaces) chmod(temporary.bytes, about.st_mode & 07777); /* the old file's permissions */
#endif
        if (ok && rename(temporary.bytes, target) != 0) {
            failed = "put in place";
            error = errno;
        }
        if (failed) remove(temporary.bytes);
    }
    if (failed && !status)
        status = ckca__fail(ctx, CKCA_EIO, "%s: cannot be %s: %s", ckca__tail(path), failed, strerror(error));
#ifdef CKCA__POSIX
    if (lock >= 0) close(lock);
    if (!status) { /* sync the folder too; failure is ignored, since some file systems do not support it */
        char *slash = strrchr(temporary.bytes, '/');
        int folder;
        if (slash) slash[slash == temporary.bytes] = 0;
        folder = open(slash ? temporary.bytes : ".", O_RDONLY);
        if (folder >= 0) {
            fsync(folder);
            close(folder);
        }
    }
    free(resolved);
#endif
    ckca__release(ctx, temporary.bytes);
    return status;
}

/* For ckca__st_write_content: the arguments of ckca__st_write_all. */
typedef struct ckca__st_content {
    ckca__text header;
    const ckca__st_item *items;
    int count;
    const void *(*fetch)(void *user, int i);
    void *user;
} ckca__st_content;

static int ckca__st_write_content(ckca__sink *sink, void *user) {
    const ckca__st_content *c = (const ckca__st_content *)user;
    return ckca__st_write_all(sink, &c->header, c->items, c->count, c->fetch, c->user);
}

/* Writes a safetensors file. Metadata keep their order, and so do tensors of types of equal width. fetch and user as in
   ckca__st_write_all. */
static ckca_status ckca__st_write(ckca_context *ctx, const char *path, const ckca__st_item *items, int count,
                                  const ckca__st_pair *meta, int metas, const void *(*fetch)(void *user, int i),
                                  void *user) {
    ckca__st_content content;
    ckca_status status;
    memset(&content, 0, sizeof content);
    content.header.ctx = ctx;
    content.items = items;
    content.count = count;
    content.fetch = fetch;
    content.user = user;
    ckca__st_header(&content.header, items, count, meta, metas);
    status = content.header.failed ? ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for its header", ckca__tail(path))
                                   : ckca__write_path(ctx, path, ckca__st_write_content, &content);
    ckca__release(ctx, content.header.bytes);
    return status;
}
#endif /* CKCA_NO_STDIO */

/* ===================================================================================================================
   ONNX                                                                                                         >>onnx

   Writes the evaluation graph as an ONNX model (https://onnx.ai, onnx.proto). The file is one protobuf message, written
   here by hand: a message is a list of fields, each a key (field number and wire type) and a number, or a length and
   that many bytes, which may be a message again. Repeated fields may come in any order, so a graph's small parts
   (nodes, shapes) are collected in memory, and its weights follow one by one.
   =================================================================================================================== */

enum { CKCA__ONNX_IR = 7, CKCA__ONNX_OPSET = 13 };   /* of onnx 1.8; ONNX Runtime 1.6 and later read it */
enum { CKCA__ONNX_FLOAT = 1, CKCA__ONNX_INT64 = 7 }; /* TensorProto.DataType */
enum { CKCA__ONNX_NAME_MAX = CKCA__NAME_MAX + 32 };

/* ---- protobuf ---- */

/* Appends a number in base 128, least significant digit first. */
static void ckca__pb_varint(ckca__text *text, uint64_t value) {
    char byte;
    for (; value > 127; value >>= 7) {
        byte = (char)(0x80 | (value & 127));
        ckca__text_add(text, &byte, 1);
    }
    byte = (char)value;
    ckca__text_add(text, &byte, 1);
}

/* Appends the key of a field that holds bytes, and their number; the bytes follow. */
static void ckca__pb_begin(ckca__text *text, int field, uint64_t size) {
    ckca__pb_varint(text, (uint64_t)field << 3 | 2);
    ckca__pb_varint(text, size);
}

static void ckca__pb_bytes(ckca__text *text, int field, const void *bytes, size_t size) {
    ckca__pb_begin(text, field, size);
    ckca__text_add(text, (const char *)bytes, size);
}

static void ckca__pb_string(ckca__text *text, int field, const char *string) {
    ckca__pb_bytes(text, field, string, strlen(string));
}

static void ckca__pb_int(ckca__text *text, int field, int64_t value) {
    ckca__pb_varint(text, (uint64_t)field << 3);
    ckca__pb_varint(text, (uint64_t)value);
}

/* Appends the message inner, and empties it for the next one. */
static void ckca__pb_message(ckca__text *text, int field, ckca__text *inner) {
    if (inner->failed) text->failed = 1;
    ckca__pb_bytes(text, field, inner->length ? inner->bytes : "", inner->length);
    inner->length = 0;
}

/* ---- the graph ---- */

/* An initialiser made from parameters, whose values are written last. */
typedef struct ckca__onnx_weight {
    char name[CKCA__NAME_MAX + 16]; /* the parameter's; a folded convolution's bias may have none in the model */
    int parameter;                  /* -1: no parameter: a bias of zeros, before folding */
    int bn;                         /* the batch norm to fold in, or -1 */
    int dims, shape[4];
} ckca__onnx_weight;

typedef struct ckca__onnx {
    ckca_model *m;
    ckca_onnx_desc d;
    ckca__text head;             /* the ModelProto without its graph */
    ckca__text graph;            /* the GraphProto without its weights */
    ckca__text node, part, more; /* messages under construction: a NodeProto; a part of something; a part of that */
    ckca__onnx_weight *weight;
    int weights;
    size_t graph_bytes;              /* of the GraphProto with its weights */
    float *host, *ordered, *channel; /* one tensor each; 4 values per channel of one batch norm */
} ckca__onnx;

static size_t ckca__onnx_weight_bytes(const ckca__onnx_weight *w) {
    size_t bytes = sizeof(float);
    int i;
    for (i = 0; i < w->dims; i++) bytes *= (size_t)w->shape[i];
    return bytes;
}

/* The name of node i's output: "/3/conv1". Slash and colon keep the names made here apart from those of layers. */
static const char *ckca__onnx_value(const ckca__onnx *o, int i, char out[CKCA__ONNX_NAME_MAX]) {
    const ckca__node *x = &o->m->node[i];
    if (i == o->m->logits)
        snprintf(out, CKCA__ONNX_NAME_MAX, "logits");
    else if (i == 0 && o->d.normalized_input)
        snprintf(out, CKCA__ONNX_NAME_MAX, "input");
    else
        snprintf(out, CKCA__ONNX_NAME_MAX, "/%d/%s", i, x->name[0] ? x->name : ckca__kind_name[x->kind]);
    return out;
}

/* Appends an input (field 1) or output (2) to the node under construction: the output of node i, or with a suffix
   (":gemm") a value between two ONNX nodes of one layer, or one of its constants. */
static void ckca__onnx_slot(ckca__onnx *o, int field, int i, const char *suffix) {
    char name[2 * CKCA__ONNX_NAME_MAX], value[CKCA__ONNX_NAME_MAX];
    if (*suffix)
        snprintf(name, sizeof name, "/%d%s", i, suffix);
    else
        snprintf(name, sizeof name, "%s", ckca__onnx_value(o, i, value));
    ckca__pb_string(&o->node, field, name);
}
static void ckca__onnx_in(ckca__onnx *o, int i, const char *suffix) { ckca__onnx_slot(o, 1, i, suffix); }

/* Ends the node under construction: its output, as ckca__onnx_in names it, and its operator. */
static void ckca__onnx_node(ckca__onnx *o, const char *op, int i, const char *suffix) {
    char name[CKCA__ONNX_NAME_MAX];
    snprintf(name, sizeof name, "/%d%s/%s", i, suffix, op);
    ckca__onnx_slot(o, 2, i, suffix);
    ckca__pb_string(&o->node, 3, name);
    ckca__pb_string(&o->node, 4, op);
    ckca__pb_message(&o->graph, 1, &o->node);
}

/* Attributes of the node under construction: count integers in a list, one integer, or a float. */
static void ckca__onnx_ints(ckca__onnx *o, const char *name, const int64_t *values, int count) {
    int i;
    ckca__pb_string(&o->part, 1, name);
    for (i = 0; i < count; i++) ckca__pb_int(&o->part, 8, values[i]);
    ckca__pb_int(&o->part, 20, 7);
    ckca__pb_message(&o->node, 5, &o->part);
}
static void ckca__onnx_int(ckca__onnx *o, const char *name, int value) {
    ckca__pb_string(&o->part, 1, name);
    ckca__pb_int(&o->part, 3, value);
    ckca__pb_int(&o->part, 20, 2);
    ckca__pb_message(&o->node, 5, &o->part);
}
static void ckca__onnx_float(ckca__onnx *o, const char *name, float value) {
    ckca__pb_string(&o->part, 1, name);
    ckca__pb_varint(&o->part, 2 << 3 | 5); /* four bytes */
    ckca__text_add(&o->part, (const char *)&value, sizeof value);
    ckca__pb_int(&o->part, 20, 1);
    ckca__pb_message(&o->node, 5, &o->part);
}

/* kernel_shape, strides and pads of a convolution or pooling. */
static void ckca__onnx_window(ckca__onnx *o, const ckca__node *x) {
    int64_t kernel[2], stride[2], pads[4];
    int i;
    for (i = 0; i < 4; i++) {
        kernel[i % 2] = x->kernel;
        stride[i % 2] = x->stride;
        pads[i] = x->pad;
    }
    ckca__onnx_ints(o, "kernel_shape", kernel, 2);
    ckca__onnx_ints(o, "strides", stride, 2);
    ckca__onnx_ints(o, "pads", pads, 4);
}

/* Adds a constant of node i, an input of the node under construction: values of the type in one dimension, or of rest
   more dimensions of length 1. */
static void ckca__onnx_constant(ckca__onnx *o, int i, const char *suffix, int type, const void *values, int count,
                                int rest) {
    char name[CKCA__ONNX_NAME_MAX];
    snprintf(name, sizeof name, "/%d%s", i, suffix);
    ckca__pb_int(&o->part, 1, count);
    while (rest-- > 0) ckca__pb_int(&o->part, 1, 1);
    ckca__pb_int(&o->part, 2, type);
    ckca__pb_string(&o->part, 8, name);
    ckca__pb_bytes(&o->part, 9, values, (size_t)count * (type == CKCA__ONNX_INT64 ? sizeof(int64_t) : sizeof(float)));
    ckca__pb_message(&o->graph, 5, &o->part);
    ckca__onnx_in(o, i, suffix);
}

/* A Reshape of the input that was just added: keeps the batch (0: as it is) and makes a x b x c of the rest (-1: what is
   left), or a x b if c is 0. */
static void ckca__onnx_reshape(ckca__onnx *o, int i, const char *constant, int a, int b, int c, const char *to) {
    int64_t shape[4];
    shape[0] = 0;
    shape[1] = a;
    shape[2] = b;
    shape[3] = c;
    ckca__onnx_constant(o, i, constant, CKCA__ONNX_INT64, shape, c ? 4 : 3, 0);
    ckca__onnx_node(o, "Reshape", i, to);
}

/* Adds the weight of this name to those that are written last, and as an input to the node under construction. */
static ckca__onnx_weight *ckca__onnx_weight_in(ckca__onnx *o, const char *name, int parameter) {
    ckca__onnx_weight *w = &o->weight[o->weights++];
    int k;
    snprintf(w->name, sizeof w->name, "%s", name);
    w->parameter = parameter;
    w->bn = -1;
    if (parameter >= 0) {
        w->dims = o->m->parameter[parameter].dims;
        for (k = 0; k < 4; k++) w->shape[k] = o->m->parameter[parameter].shape[k];
    }
    ckca__pb_string(&o->node, 1, name);
    return w;
}

/* All parameters of a node, in the order in which its builder added them. */
static void ckca__onnx_weights_in(ckca__onnx *o, int i) {
    const int first = o->m->node[i].tensor;
    int p;
    for (p = first; p < o->m->parameters && o->m->parameter[p].node == i; p++)
        ckca__onnx_weight_in(o, o->m->parameter[p].name, p);
}

/* ---- one writer per kind of layer: adds the nodes that compute node i from its inputs ---- */

static void ckca__onnx_input(ckca__onnx *o, int i) {
    const int c = o->m->channels;
    float *scaled = o->channel;
    int k;
    if (o->d.normalized_input) return;
    for (k = 0; k < 2 * c; k++) scaled[k] = 255 * o->m->normalization[k];
    ckca__pb_string(&o->node, 1, "input");
    ckca__onnx_constant(o, i, ":mean", CKCA__ONNX_FLOAT, scaled, c, 2);
    ckca__onnx_node(o, "Sub", i, ":centred");
    ckca__onnx_in(o, i, ":centred");
    ckca__onnx_constant(o, i, ":std", CKCA__ONNX_FLOAT, scaled + c, c, 2);
    ckca__onnx_node(o, "Div", i, "");
}

/* Convolution i; bn: the batch norm that is folded into it, or -1. */
static void ckca__onnx_convolution(ckca__onnx *o, int i, int bn) {
    const ckca__node *x = &o->m->node[i];
    char bias[CKCA__NAME_MAX + 16];
    ckca__onnx_weight *w;
    ckca__onnx_in(o, x->in[0], "");
    if (bn < 0) {
        ckca__onnx_weights_in(o, i);
    } else {
        ckca__onnx_weight_in(o, o->m->parameter[x->tensor].name, x->tensor)->bn = bn;
        snprintf(bias, sizeof bias, "%s.bias", x->name);
        w = ckca__onnx_weight_in(o, bias, x->bias ? x->tensor + CKCA__PARAM_BIAS : -1);
        w->bn = bn;
        w->dims = 1;
        w->shape[0] = x->c;
    }
    ckca__onnx_window(o, x);
    if (x->groups > 1) ckca__onnx_int(o, "group", x->groups);
    ckca__onnx_node(o, "Conv", bn < 0 ? i : bn, "");
}

/* 1 if convolution i is folded into the batch norm that reads it. */
static int ckca__onnx_folds(const ckca__onnx *o, int i) { return o->d.fold_batchnorm && o->m->node[i].folded; }

static void ckca__onnx_conv(ckca__onnx *o, int i) {
    if (!ckca__onnx_folds(o, i)) ckca__onnx_convolution(o, i, -1);
}

static void ckca__onnx_batchnorm(ckca__onnx *o, int i) {
    const int from = o->m->node[i].in[0];
    if (ckca__onnx_folds(o, from)) {
        ckca__onnx_convolution(o, from, i);
        return;
    }
    ckca__onnx_in(o, from, "");
    ckca__onnx_weights_in(o, i);
    ckca__onnx_float(o, "epsilon", 1e-5f);
    ckca__onnx_node(o, "BatchNormalization", i, "");
}

static void ckca__onnx_relu(ckca__onnx *o, int i) {
    ckca__onnx_in(o, o->m->node[i].in[0], "");
    ckca__onnx_node(o, "Relu", i, "");
}

static void ckca__onnx_add(ckca__onnx *o, int i) {
    ckca__onnx_in(o, o->m->node[i].in[0], "");
    ckca__onnx_in(o, o->m->node[i].in[1], "");
    ckca__onnx_node(o, "Add", i, "");
}

static void ckca__onnx_maxpool(ckca__onnx *o, int i) {
    ckca__onnx_in(o, o->m->node[i].in[0], "");
    ckca__onnx_window(o, &o->m->node[i]);
    ckca__onnx_node(o, "MaxPool", i, "");
}

static void ckca__onnx_avgpool(ckca__onnx *o, int i) {
    ckca__onnx_in(o, o->m->node[i].in[0], "");
    ckca__onnx_node(o, "GlobalAveragePool", i, "");
}

static void ckca__onnx_subsample(ckca__onnx *o, int i) {
    const ckca__node *x = &o->m->node[i], *source = &o->m->node[x->in[0]];
    const int more = x->c - source->c; /* channels of zeros */
    int64_t start[2] = {0, 0}, end[2], axis[2] = {2, 3}, step[2], pads[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    end[0] = source->h;
    end[1] = source->w;
    step[0] = step[1] = x->stride;
    ckca__onnx_in(o, x->in[0], "");
    ckca__onnx_constant(o, i, ":starts", CKCA__ONNX_INT64, start, 2, 0);
    ckca__onnx_constant(o, i, ":ends", CKCA__ONNX_INT64, end, 2, 0);
    ckca__onnx_constant(o, i, ":axes", CKCA__ONNX_INT64, axis, 2, 0);
    ckca__onnx_constant(o, i, ":steps", CKCA__ONNX_INT64, step, 2, 0);
    ckca__onnx_node(o, "Slice", i, more ? ":slice" : "");
    if (!more) return;
    pads[1] = more / 2;
    pads[5] = more - more / 2;
    ckca__onnx_in(o, i, ":slice");
    ckca__onnx_constant(o, i, ":pads", CKCA__ONNX_INT64, pads, 8, 0);
    ckca__onnx_node(o, "Pad", i, "");
}

/* Values between layers have four dimensions; only the logits have two. */
static void ckca__onnx_linear(ckca__onnx *o, int i) {
    const ckca__node *x = &o->m->node[i], *source = &o->m->node[x->in[0]];
    const int64_t nhwc[4] = {0, 2, 3, 1}; /* the order in which the weight takes a map */
    const int map = source->h > 1 || source->w > 1, inner = i != o->m->logits;
    ckca__onnx_in(o, x->in[0], "");
    if (map) {
        ckca__onnx_ints(o, "perm", nhwc, 4);
        ckca__onnx_node(o, "Transpose", i, ":nhwc");
        ckca__onnx_in(o, i, ":nhwc");
    }
    ckca__onnx_int(o, "axis", 1);
    ckca__onnx_node(o, "Flatten", i, ":flat");
    ckca__onnx_in(o, i, ":flat");
    ckca__onnx_weights_in(o, i);
    ckca__onnx_int(o, "transB", 1);
    ckca__onnx_node(o, "Gemm", i, inner ? ":gemm" : "");
    if (!inner) return;
    ckca__onnx_in(o, i, ":gemm");
    ckca__onnx_reshape(o, i, ":shape", x->c, 1, 1, "");
}

/* ONNX's own GroupNormalization needs opset 21: here it is the instance norm of each group, as one long channel. */
static void ckca__onnx_groupnorm(ckca__onnx *o, int i) {
    const ckca__node *x = &o->m->node[i];
    const int first = x->tensor;
    int k;
    ckca__onnx_in(o, x->in[0], "");
    ckca__onnx_reshape(o, i, ":groups", x->groups, -1, 0, ":grouped");
    for (k = 0; k < x->groups; k++) {
        o->channel[k] = 1;
        o->channel[x->groups + k] = 0;
    }
    ckca__onnx_in(o, i, ":grouped");
    ckca__onnx_constant(o, i, ":ones", CKCA__ONNX_FLOAT, o->channel, x->groups, 0);
    ckca__onnx_constant(o, i, ":zeros", CKCA__ONNX_FLOAT, o->channel + x->groups, x->groups, 0);
    ckca__onnx_float(o, "epsilon", 1e-5f);
    ckca__onnx_node(o, "InstanceNormalization", i, ":instance");
    ckca__onnx_in(o, i, ":instance");
    ckca__onnx_reshape(o, i, ":shape", x->c, x->h, x->w, ":normalized");
    for (k = 0; k < 2; k++) {
        ckca__onnx_in(o, i, k ? ":scaled" : ":normalized");
        ckca__onnx_weight_in(o, o->m->parameter[first + k].name, first + k)->dims = 3; /* C x 1 x 1 */
        ckca__onnx_node(o, k ? "Add" : "Mul", i, k ? "" : ":scaled");
    }
}

/* In the order of ckca__kind. */
static void (*const ckca__onnx_layers[CKCA__KIND_COUNT])(ckca__onnx *o, int i) = {
    ckca__onnx_input,   ckca__onnx_conv,    ckca__onnx_batchnorm, ckca__onnx_relu,   ckca__onnx_add,
    ckca__onnx_maxpool, ckca__onnx_avgpool, ckca__onnx_subsample, ckca__onnx_linear, ckca__onnx_groupnorm};

/* ---- the model ---- */

/* Adds the graph's input (field 11) or output (12), in float32. shape: the dimensions after the batch. */
static void ckca__onnx_value_info(ckca__onnx *o, int field, const char *name, const int *shape, int dims,
                                  const char *about) {
    ckca__text *type = &o->node, *tensor = &o->part, *dim = &o->more, whole;
    int i;
    memset(&whole, 0, sizeof whole);
    whole.ctx = o->m->ctx;
    for (i = -1; i < dims; i++) {
        if (i < 0)
            ckca__pb_string(dim, 2, "N");
        else
            ckca__pb_int(dim, 1, shape[i]);
        ckca__pb_message(&whole, 1, dim);
    }
    ckca__pb_int(tensor, 1, CKCA__ONNX_FLOAT);
    ckca__pb_message(tensor, 2, &whole);
    ckca__pb_message(type, 1, tensor);
    ckca__pb_string(&whole, 1, name);
    ckca__pb_message(&whole, 2, type);
    ckca__pb_string(&whole, 3, about);
    ckca__pb_message(&o->graph, field, &whole);
    ckca__release(o->m->ctx, whole.bytes);
}

static void ckca__onnx_metadata(ckca__onnx *o, const char *key, const char *value) {
    ckca__pb_string(&o->part, 1, key);
    ckca__pb_string(&o->part, 2, value);
    ckca__pb_message(&o->head, 14, &o->part);
}

/* Everything in the ModelProto but the graph. Returns 0 if out of memory. */
static int ckca__onnx_head(ckca__onnx *o) {
    const ckca_model *m = o->m;
    char *names = NULL, number[16];
    ckca__text floats;
    int side;
    memset(&floats, 0, sizeof floats);
    floats.ctx = m->ctx;
    ckca__pb_int(&o->head, 1, CKCA__ONNX_IR);
    ckca__pb_string(&o->head, 2, "ckca.h");
    ckca__pb_string(&o->head, 3, CKCA_VERSION);
    ckca__pb_string(&o->part, 1, ""); /* the default domain */
    ckca__pb_int(&o->part, 2, CKCA__ONNX_OPSET);
    ckca__pb_message(&o->head, 8, &o->part);
    ckca__onnx_metadata(o, "ckca.version", CKCA_VERSION);
    ckca__onnx_metadata(o, "ckca.arch", m->arch);
    snprintf(number, sizeof number, "%d", m->classes);
    ckca__onnx_metadata(o, "ckca.classes", number);
    snprintf(number, sizeof number, "%d", m->updates);
    ckca__onnx_metadata(o, "ckca.step", number);
    if (m->class_names) {
        names = ckca__names_to_json(m->ctx, (const char *const *)m->class_names, m->classes);
        if (!names) return 0;
        ckca__onnx_metadata(o, "ckca.class_names", names);
        ckca__release(m->ctx, names);
    }
    for (side = 0; side < 2 && m->normalized; side++) {
        ckca__text_floats(&floats, m->normalization + side * m->channels, m->channels);
        if (!floats.failed) ckca__onnx_metadata(o, side ? "ckca.std" : "ckca.mean", floats.bytes);
        floats.length = 0;
    }
    ckca__release(m->ctx, floats.bytes);
    return !floats.failed && !o->head.failed;
}

/* Everything in the GraphProto but the weights, of which it makes the list. needed: a byte per node, 0. */
static ckca_status ckca__onnx_graph(ckca__onnx *o, unsigned char *needed) {
    const ckca_model *m = o->m;
    int shape[3], i, side;
    needed[m->logits] = needed[0] = 1;
    for (i = m->logits; i > 0; i--)
        for (side = 0; side < 2 && needed[i]; side++)
            if (m->node[i].in[side] >= 0) needed[m->node[i].in[side]] = 1;
    ckca__pb_string(&o->graph, 2, m->arch);
    shape[0] = m->channels;
    shape[1] = m->height;
    shape[2] = m->width;
    ckca__onnx_value_info(o, 11, "input", shape, 3,
                          o->d.normalized_input
                              ? "pictures, batch x channels x height x width: (byte / 255 - mean) / std per channel"
                              : "pictures, batch x channels (red, green, blue) x height x width: bytes, 0 to 255");
    ckca__onnx_value_info(o, 12, "logits", &m->classes, 1, "batch x classes, before the softmax");
    for (i = 0; i <= m->logits; i++) {
        if (!needed[i]) continue;
        if (!ckca__onnx_layers[m->node[i].kind])
            return ckca__fail(m->ctx, CKCA_EINVAL, "onnx: node %d is %s, which cannot be written", i,
                              ckca__kind_name[m->node[i].kind]);
        ckca__onnx_layers[m->node[i].kind](o, i);
    }
    return CKCA_OK;
}

/* Puts the TensorProto of a weight into o->part, but for its values; returns the message's size with them. */
static size_t ckca__onnx_tensor(ckca__onnx *o, const ckca__onnx_weight *w) {
    const size_t bytes = ckca__onnx_weight_bytes(w);
    int i;
    o->part.length = 0;
    for (i = 0; i < w->dims; i++) ckca__pb_int(&o->part, 1, w->shape[i]);
    ckca__pb_int(&o->part, 2, CKCA__ONNX_FLOAT);
    ckca__pb_string(&o->part, 8, w->name);
    ckca__pb_begin(&o->part, 9, bytes);
    return o->part.length + bytes;
}

/* Adds up the file's size; builds every message that ckca__onnx_write will need, so that it need not allocate. */
static size_t ckca__onnx_measure(ckca__onnx *o) {
    int i;
    o->graph_bytes = o->graph.length;
    for (i = 0; i < o->weights; i++) {
        const size_t bytes = ckca__onnx_tensor(o, &o->weight[i]);
        o->more.length = 0;
        ckca__pb_begin(&o->more, 5, bytes);
        o->graph_bytes = ckca__sum(o->graph_bytes, ckca__sum(bytes, o->more.length));
    }
    o->more.length = 0;
    ckca__pb_begin(&o->more, 7, o->graph_bytes);
    return ckca__sum(ckca__sum(o->head.length, o->more.length), o->graph_bytes);
}

/* The values of a weight, in PyTorch's order, with a batch norm folded in if it has one. */
static const float *ckca__onnx_values(ckca__onnx *o, const ckca__onnx_weight *w) {
    const ckca_model *m = o->m;
    const size_t count = ckca__onnx_weight_bytes(w) / sizeof(float);
    size_t i;
    if (w->parameter >= 0) {
        const ckca__parameter *p = &m->parameter[w->parameter];
        ckca__device_download(m->ctx, o->host, m->values + p->offset, count * sizeof(float));
        ckca__reorder(p, o->host, o->ordered, 1);
    } else
        memset(o->ordered, 0, count * sizeof(float));
    if (w->bn >= 0) { /* as ckca__op_fold */
        const size_t c = (size_t)m->node[w->bn].c, per = count / c;
        const float *gamma = o->channel, *beta = gamma + c, *mean = beta + c, *var = mean + c;
        for (i = 0; i < 4; i++)
            ckca__device_download(m->ctx, o->channel + i * c, ckca__param(m, &m->node[w->bn], m->values, (int)i),
                                  c * sizeof(float));
        for (i = 0; i < count; i++) {
            const size_t k = i / per;
            const double scale = (double)gamma[k] / sqrt((double)var[k] + 1e-5);
            if (w->dims == 1)
                o->ordered[i] = (float)((double)beta[k] + ((double)o->ordered[i] - (double)mean[k]) * scale);
            else
                o->ordered[i] = (float)((double)o->ordered[i] * scale);
        }
    }
    return o->ordered;
}

static int ckca__onnx_write(ckca__sink *sink, void *user) {
    ckca__onnx *o = (ckca__onnx *)user;
    int i, ok;
    o->more.length = 0;
    ckca__pb_begin(&o->more, 7, o->graph_bytes);
    ok = ckca__sink_write(sink, o->head.bytes, o->head.length) &&
         ckca__sink_write(sink, o->more.bytes, o->more.length) &&
         ckca__sink_write(sink, o->graph.bytes, o->graph.length);
    for (i = 0; i < o->weights && ok; i++) {
        const ckca__onnx_weight *w = &o->weight[i];
        const size_t bytes = ckca__onnx_tensor(o, w);
        o->more.length = 0;
        ckca__pb_begin(&o->more, 5, bytes);
        ok = ckca__sink_write(sink, o->more.bytes, o->more.length) &&
             ckca__sink_write(sink, o->part.bytes, o->part.length) &&
             ckca__sink_write(sink, ckca__onnx_values(o, w), ckca__onnx_weight_bytes(w));
    }
    return ok;
}

/* Writes the model to path or, if it is NULL, to memory. */
static ckca_status ckca__onnx_export(ckca_model *m, const char *path, const ckca_onnx_desc *desc, void *out,
                                     size_t capacity, size_t *size) {
    ckca_context *ctx = m->ctx;
    const char *what = path ? ckca__tail(path) : "onnx";
    ckca__bound bounds[2] = {{"fold_batchnorm", 0, 0, 1, 0}, {"normalized_input", 0, 0, 1, 0}};
    ckca__onnx onnx, *o = &onnx;
    ckca__sink sink;
    unsigned char *needed;
    size_t most = 0, widest = (size_t)m->channels, total = 0;
    int i;
    ckca_status status;
    memset(o, 0, sizeof *o);
    o->m = m;
    o->head.ctx = o->graph.ctx = o->node.ctx = o->part.ctx = o->more.ctx = ctx;
    if (desc) o->d = *desc;
    bounds[0].value = o->d.fold_batchnorm;
    bounds[1].value = o->d.normalized_input;
    if ((status = ckca__check_bounds(ctx, "onnx", bounds, 2))) return status;
    if (!m->normalized && !o->d.normalized_input)
        return ckca__fail(
            ctx, CKCA_EINVAL,
            "onnx: the model has no mean and std for the graph to normalise its input with: train it, give "
            "them in its desc, or set normalized_input");
    if ((status = ckca__check_all_finite(m, what, 0))) return status;
    for (i = 0; i < m->parameters; i++)
        if (m->parameter[i].count > most) most = m->parameter[i].count;
    for (i = 0; i < m->nodes; i++)
        if ((size_t)m->node[i].c > widest) widest = (size_t)m->node[i].c;
    needed = (unsigned char *)ckca__alloc(ctx, (size_t)m->nodes);
    o->weight = (ckca__onnx_weight *)ckca__alloc(ctx, (size_t)m->parameters * 2 * sizeof *o->weight);
    o->host = (float *)ckca__alloc(ctx, most * sizeof(float));
    o->ordered = (float *)ckca__alloc(ctx, most * sizeof(float));
    o->channel = (float *)ckca__alloc(ctx, widest * 4 * sizeof(float));
    if (!needed || !o->weight || !o->host || !o->ordered || !o->channel || !ckca__onnx_head(o))
        status = CKCA_ENOMEM;
    else if (!(status = ckca__onnx_graph(o, needed))) {
        total = ckca__onnx_measure(o);
        if (o->graph.failed || o->node.failed || o->part.failed || o->more.failed) status = CKCA_ENOMEM;
    }
    if (status == CKCA_ENOMEM)
        status =
            ckca__fail(ctx, CKCA_ENOMEM, "%s: out of memory for writing an ONNX model of %d nodes", what, m->nodes);
    if (!status && total > INT32_MAX)
        status = ckca__fail(ctx, CKCA_EINVAL, "%s: the model would have %.0f bytes; an ONNX file holds at most %ld",
                            what, (double)total, (long)INT32_MAX);
    if (!status && size) *size = total;
#ifndef CKCA_NO_STDIO
    if (!status && path) status = ckca__write_path(ctx, path, ckca__onnx_write, o);
#endif
    if (!status && out && capacity < total) {
        status = ckca__fail(ctx, CKCA_EINVAL, "onnx: out has %.0f bytes, the model needs %.0f", (double)capacity,
                            (double)total);
    } else if (!status && out) {
        memset(&sink, 0, sizeof sink);
        sink.memory = (unsigned char *)out;
        ckca__onnx_write(&sink, o);
        status = ckca__device_status(ctx); /* a failed download */
    }
    ckca__release(ctx, needed);
    ckca__release(ctx, o->weight);
    ckca__release(ctx, o->host);
    ckca__release(ctx, o->ordered);
    ckca__release(ctx, o->channel);
    ckca__release(ctx, o->head.bytes);
    ckca__release(ctx, o->graph.bytes);
    ckca__release(ctx, o->node.bytes);
    ckca__release(ctx, o->part.bytes);
    ckca__release(ctx, o->more.bytes);
    return status;
}

#ifndef CKCA_NO_STDIO
CKCA_API ckca_status ckca_save_onnx(ckca_model *m, const char *path, const ckca_onnx_desc *desc) {
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!path) return ckca__null(m->ctx, "ckca_save_onnx", "path");
    if ((status = ckca__check_finished(m, "ckca_save_onnx"))) return status;
    return ckca__onnx_export(m, path, desc, NULL, 0, NULL);
}
#endif

CKCA_API ckca_status ckca_save_onnx_memory(ckca_model *m, const ckca_onnx_desc *desc, void *out, size_t capacity,
                                           size_t *size) {
    ckca_status status;
    if (!m) return CKCA_EINVAL;
    if (!size) return ckca__null(m->ctx, "ckca_save_onnx_memory", "size");
    if ((status = ckca__check_finished(m, "ckca_save_onnx_memory"))) return status;
    *size = 0;
    return ckca__onnx_export(m, NULL, desc, out, capacity, size);
}

/* The library ends here. What follows is the engine for the CPU: REFERENCE KERNELS say in plain loops what every op
   computes, THREADS shares work out, VECTOR KERNELS are the fast forms, HOST OPS choose among them. */

/* ===================================================================================================================
   REFERENCE KERNELS                                                                                       >>reference

   What the ops compute, in plain loops, forward beside backward: a ResNet to read. The tests compare the vector kernels
   with these loops, and they run where there are no vector kernels. The innermost loop always runs over neighbours in
   memory.
   =================================================================================================================== */

/* ---- convolution ----

       y[n][p][q][k] = sum over r, s, c of x[n][p stride - pad + r][q stride - pad + s][c] w[k][r][s][c]

   In groups, c runs over the channels of k's group alone. Pixels outside x count as zero. y is linear in x and in w, so
   both gradients are the same sum read from the other end: every product x w that contributes to y sends dy w back to x
   and dy x back to w. */

/* Arguments of the tasks of all three passes; each pass sets what it needs. */
typedef struct ckca__naive_conv {
    const ckca__conv *s;
    const float *x, *w, *dy, *bias, *residual; /* w: R x S x C x K in the forward pass, else K x R x S x C */
    float *y, *dx, *dw, *dbias;
    int relu, accumulate;
} ckca__naive_conv;

/* One row of y: n p of them. */
static void ckca__naive_conv_forward_row(void *job, int row, int thread) {
    const ckca__naive_conv *a = (const ckca__naive_conv *)job;
    const ckca__conv *s = a->s;
    const int inputs = ckca__group_inputs(s), groups = s->c / inputs, outputs = s->k / groups;
    int n = row / s->p, p = row % s->p, q, r, t, c, j, g;
    (void)thread;
    for (q = 0; q < s->q; q++) {
        ptrdiff_t at = ((ptrdiff_t)row * s->q + q) * s->k;
        float *to = a->y + at;
        for (j = 0; j < s->k; j++) to[j] = a->bias ? a->bias[j] : 0.0f;
        for (r = 0; r < s->r; r++)
            for (t = 0; t < s->s; t++) {
                int iy = p * s->stride - s->pad + r, ix = q * s->stride - s->pad + t;
                const float *from = a->x + (((ptrdiff_t)n * s->h + iy) * s->w + ix) * s->c;
                if (iy < 0 || iy >= s->h || ix < 0 || ix >= s->w) continue;
                for (g = 0; g < groups; g++)
                    for (c = 0; c < inputs; c++) {
                        const float *weight = a->w + (((ptrdiff_t)r * s->s + t) * inputs + c) * s->k;
                        const float pixel = from[g * inputs + c];
                        for (j = g * outputs; j < (g + 1) * outputs; j++) to[j] += pixel * weight[j];
                    }
            }
        for (j = 0; j < s->k; j++) {
            if (a->residual) to[j] += a->residual[at + j];
            if (a->relu && to[j] < 0) to[j] = 0;
        }
    }
}

/* y = relu?(conv(x, w) + bias + residual). ws: R S C K floats, for w transposed to R x S x C x K. */
static void ckca__naive_conv_forward(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w,
                                     const float *bias, const float *residual, int relu, float *y, float *ws) {
    ckca__naive_conv job;
    ptrdiff_t per = (ptrdiff_t)s->r * s->s * ckca__group_inputs(s), i;
    int k;
    for (k = 0; k < s->k; k++)
        for (i = 0; i < per; i++) ws[i * s->k + k] = w[k * per + i];
    memset(&job, 0, sizeof job);
    job.s = s;
    job.x = x;
    job.w = ws;
    job.bias = bias;
    job.residual = residual;
    job.relu = relu;
    job.y = y;
    ckca__parallel(ctx, s->n * s->p, ckca__naive_conv_forward_row, &job);
}

/* One row of dx: n h of them. */
static void ckca__naive_conv_backward_data_row(void *job, int row, int thread) {
    const ckca__naive_conv *a = (const ckca__naive_conv *)job;
    const ckca__conv *s = a->s;
    const int inputs = ckca__group_inputs(s), outputs = s->k / (s->c / inputs);
    int n = row / s->h, y = row % s->h, x, r, t, k, c;
    (void)thread;
    for (x = 0; x < s->w; x++) {
        float *to = a->dx + ((ptrdiff_t)row * s->w + x) * s->c;
        if (!a->accumulate) memset(to, 0, sizeof *to * (size_t)s->c);
        for (r = 0; r < s->r; r++)
            for (t = 0; t < s->s; t++) {
                int top = y + s->pad - r, left = x + s->pad - t, p = top / s->stride, q = left / s->stride;
                const float *from = a->dy + (((ptrdiff_t)n * s->p + p) * s->q + q) * s->k;
                if (top < 0 || top % s->stride || p >= s->p || left < 0 || left % s->stride || q >= s->q) continue;
                for (k = 0; k < s->k; k++) {
                    const float *weight = a->w + (((ptrdiff_t)k * s->r + r) * s->s + t) * inputs;
                    float *of_group = to + k / outputs * inputs;
                    for (c = 0; c < inputs; c++) of_group[c] += from[k] * weight[c];
                }
            }
    }
}

/* dx (+)= the sum of dy w over the outputs that read this pixel of x. */
static void ckca__naive_conv_backward_data(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w,
                                           float *dx, int accumulate) {
    ckca__naive_conv job;
    memset(&job, 0, sizeof job);
    job.s = s;
    job.dy = dy;
    job.w = w;
    job.dx = dx;
    job.accumulate = accumulate;
    ckca__parallel(ctx, s->n * s->h, ckca__naive_conv_backward_data_row, &job);
}

/* The weights of one output channel. */
static void ckca__naive_conv_backward_weight_channel(void *job, int k, int thread) {
    const ckca__naive_conv *a = (const ckca__naive_conv *)job;
    const ckca__conv *s = a->s;
    const int inputs = ckca__group_inputs(s), first = k / (s->k / (s->c / inputs)) * inputs;
    ptrdiff_t row, rows = (ptrdiff_t)s->n * s->p;
    float sum = 0.0f;
    int q, r, t, c;
    (void)thread;
    for (row = 0; row < rows; row++)
        for (q = 0; q < s->q; q++) {
            ptrdiff_t n = (ptrdiff_t)(row / s->p);
            float from = a->dy[(row * s->q + q) * s->k + k];
            sum += from;
            for (r = 0; r < s->r; r++)
                for (t = 0; t < s->s; t++) {
                    int iy = (int)(row % s->p) * s->stride - s->pad + r, ix = q * s->stride - s->pad + t;
                    const float *pixel = a->x + ((n * s->h + iy) * s->w + ix) * s->c + first;
                    float *to = a->dw + (((ptrdiff_t)k * s->r + r) * s->s + t) * inputs;
                    if (iy < 0 || iy >= s->h || ix < 0 || ix >= s->w) continue;
                    for (c = 0; c < inputs; c++) to[c] += from * pixel[c];
                }
        }
    if (a->dbias) a->dbias[k] += sum;
}

/* dw += the sum of dy x over output pixels; dbias += the sum of dy. */
static void ckca__naive_conv_backward_weight(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy,
                                             float *dw, float *dbias) {
    ckca__naive_conv job;
    memset(&job, 0, sizeof job);
    job.s = s;
    job.x = x;
    job.dy = dy;
    job.dw = dw;
    job.dbias = dbias;
    ckca__parallel(ctx, s->k, ckca__naive_conv_backward_weight_channel, &job);
}

/* ---- batch norm ---- */

#define CKCA__BATCHNORM_EPS 1e-5
#define CKCA__BATCHNORM_MOMENTUM 0.1

/* Finishes one channel's statistics: stores mean and inverse standard deviation and updates the running statistics. The
   running variance is unbiased; a single row has none, so the biased variance, 0, is used. */
static void ckca__batchnorm_finish(size_t rows, double mean, double var, float *running_mean, float *running_var,
                                   float *out_mean, float *out_inv_std) {
    double unbiased = rows > 1 ? var * (double)rows / (double)(rows - 1) : var;
    *out_mean = (float)mean;
    *out_inv_std = (float)(1 / sqrt(var + CKCA__BATCHNORM_EPS));
    *running_mean += (float)(CKCA__BATCHNORM_MOMENTUM * (mean - *running_mean));
    *running_var += (float)(CKCA__BATCHNORM_MOMENTUM * (unbiased - *running_var));
}

/* Normalises one value of channel j. */
static float ckca__naive_norm(const ckca__norm *norm, int relu, int j, float x) {
    float v = (x - norm->mean[j]) * (norm->gamma[j] * norm->inv_std[j]) + norm->beta[j];
    return relu && v <= 0 ? 0 : v; /* NaN passes through */
}

/* y = relu?(norm(x) + residual). */
static void ckca__naive_batchnorm_apply(size_t rows, int c, const float *x, const ckca__norm *norm,
                                        const float *residual, const ckca__norm *residual_norm, float *y) {
    ptrdiff_t i;
    int j;
    for (i = 0; i < (ptrdiff_t)rows * c; i += c)
        for (j = 0; j < c; j++) {
            float v = ckca__naive_norm(norm, 0, j, x[i + j]);
            if (residual_norm)
                v += ckca__naive_norm(residual_norm, residual_norm->relu, j, residual[i + j]);
            else if (residual)
                v += residual[i + j];
            y[i + j] = norm->relu && v <= 0 ? 0 : v;
        }
}

static void ckca__naive_batchnorm_forward(size_t rows, int c, const float *x, const float *gamma, const float *beta,
                                          float *running_mean, float *running_var, const float *residual,
                                          const ckca__norm *residual_norm, int relu, float *y, float *mean,
                                          float *inv_std, void *ws) {
    const ckca__norm norm = {mean, inv_std, gamma, beta, relu};
    double *sum = (double *)ws, *square = sum + c;
    ptrdiff_t i;
    int j;
    memset(sum, 0, 2 * (size_t)c * sizeof *sum);
    for (i = 0; i < (ptrdiff_t)rows * c; i += c)
        for (j = 0; j < c; j++) sum[j] += x[i + j];
    for (j = 0; j < c; j++) sum[j] /= (double)rows;
    for (i = 0; i < (ptrdiff_t)rows * c; i += c)
        for (j = 0; j < c; j++) square[j] += (x[i + j] - sum[j]) * (x[i + j] - sum[j]);
    for (j = 0; j < c; j++)
        ckca__batchnorm_finish(rows, sum[j], square[j] / (double)rows, running_mean + j, running_var + j, mean + j,
                               inv_std + j);
    if (y) ckca__naive_batchnorm_apply(rows, c, x, &norm, residual, residual_norm, y);
}

/* 1 if the ReLU passed x[i + j], or there is none. y may be NULL: y > 0 is then recomputed from x. */
static int ckca__naive_batchnorm_gate(const float *x, const float *y, ptrdiff_t i, int j, const ckca__norm *norm) {
    return !norm->relu || (y ? y[i + j] : ckca__naive_norm(norm, 1, j, x[i + j])) > 0;
}

/* With g = dy where y > 0, else 0, and xhat = (x - mean) inv_std:
   dbeta = sum g, dgamma = sum g xhat, dx = gamma inv_std (g - dbeta / rows - xhat dgamma / rows). Where the statistics
   are constants (dgamma is NULL), both sums are 0 in dx. */
static void ckca__naive_batchnorm_backward(size_t rows, int c, const float *x, const float *y, const float *dy,
                                           const ckca__norm *norm, float *dx, float *dresidual, int accumulate_residual,
                                           float *dgamma, float *dbeta, void *ws) {
    const float *gamma = norm->gamma, *mean = norm->mean, *inv_std = norm->inv_std;
    double *sum = (double *)ws, *product = sum + c;
    ptrdiff_t i;
    int j;
    memset(sum, 0, 2 * (size_t)c * sizeof *sum);
    for (i = 0; dgamma && i < (ptrdiff_t)rows * c; i += c)
        for (j = 0; j < c; j++) {
            float g = ckca__naive_batchnorm_gate(x, y, i, j, norm) ? dy[i + j] : 0;
            sum[j] += g;
            product[j] += g * (x[i + j] - mean[j]) * inv_std[j];
        }
    for (j = 0; dgamma && j < c; j++) dbeta[j] += (float)sum[j], dgamma[j] += (float)product[j];
    for (i = 0; i < (ptrdiff_t)rows * c; i += c)
        for (j = 0; j < c; j++) {
            float g = ckca__naive_batchnorm_gate(x, y, i, j, norm) ? dy[i + j] : 0;
            float xhat = (x[i + j] - mean[j]) * inv_std[j];
            dx[i + j] = gamma[j] * inv_std[j] *
                        (g - (float)(sum[j] / (double)rows) - xhat * (float)(product[j] / (double)rows));
            if (dresidual) dresidual[i + j] = accumulate_residual ? dresidual[i + j] + g : g;
        }
}

static void ckca__naive_batchnorm_eval(size_t rows, int c, const float *x, const float *gamma, const float *beta,
                                       const float *running_mean, const float *running_var, const float *residual,
                                       int relu, float *y) {
    ptrdiff_t i;
    int j;
    for (i = 0; i < (ptrdiff_t)rows * c; i += c)
        for (j = 0; j < c; j++) {
            float inv_std = (float)(1 / sqrt(running_var[j] + CKCA__BATCHNORM_EPS));
            float v = (x[i + j] - running_mean[j]) * (gamma[j] * inv_std) + beta[j];
            if (residual) v += residual[i + j];
            y[i + j] = relu && v <= 0 ? 0 : v;
        }
}

/* ---- element-wise ---- */

static void ckca__naive_add(size_t count, const float *a, const float *b, int relu, float *y) {
    size_t i;
    for (i = 0; i < count; i++) {
        float v = b ? a[i] + b[i] : a[i];
        y[i] = relu && v <= 0 ? 0 : v;
    }
}

static void ckca__naive_add_backward(size_t count, const float *y, const float *dy, float *dx, int accumulate) {
    size_t i;
    for (i = 0; i < count; i++) {
        float g = y && !(y[i] > 0) ? 0 : dy[i];
        dx[i] = accumulate ? dx[i] + g : g;
    }
}

/* ---- pooling ---- */

#define CKCA__TAPS 256 /* kernel positions, at most: the argmax array stores one in a byte */

/* One output pixel of c channels: y = the maximum over its taps, at (unless NULL) = the kernel position of the maximum.
   NaN wins, as in PyTorch. */
static void ckca__naive_maxpool_pixel(int c, int taps, const float *const *from, const unsigned char *position,
                                      float *y, unsigned char *at) {
    int j, t;
    for (j = 0; j < c; j++) {
        unsigned char where = 0;
        y[j] = -INFINITY;
        for (t = 0; t < taps; t++)
            if (from[t][j] > y[j] || from[t][j] != from[t][j]) y[j] = from[t][j], where = position[t];
        if (at) at[j] = where;
    }
}

/* One input pixel of c channels: dx = the sum of dy over the outputs whose maximum it was. Output t of those that read
   the pixel lies at offset from[t] and reads it at kernel position position[t]. */
static void ckca__naive_maxpool_pixel_backward(int c, int taps, const ptrdiff_t *from, const unsigned char *position,
                                               const float *dy, const unsigned char *at, float *dx, int accumulate) {
    int j, t;
    for (j = 0; j < c; j++) {
        float sum = accumulate ? dx[j] : 0;
        for (t = 0; t < taps; t++)
            if (at[from[t] + j] == position[t]) sum += dy[from[t] + j];
        dx[j] = sum;
    }
}

typedef struct ckca__avgpool {
    int area, c;
    const float *from; /* x, or dy */
    float *to;         /* y, or dx */
    int accumulate;
} ckca__avgpool;

/* One picture. */
static void ckca__avgpool_picture(void *job, int i, int thread) {
    const ckca__avgpool *o = (const ckca__avgpool *)job;
    const float *from = o->from + (size_t)i * (size_t)o->area * (size_t)o->c;
    float *to = o->to + (size_t)i * (size_t)o->c;
    int a, j;
    (void)thread;
    memset(to, 0, (size_t)o->c * sizeof *to);
    for (a = 0; a < o->area; a++, from += o->c)
        for (j = 0; j < o->c; j++) to[j] += from[j];
    for (j = 0; j < o->c; j++) to[j] /= (float)o->area;
}

static void ckca__avgpool_backward_picture(void *job, int i, int thread) {
    const ckca__avgpool *o = (const ckca__avgpool *)job;
    const float *from = o->from + (size_t)i * (size_t)o->c;
    float *to = o->to + (size_t)i * (size_t)o->area * (size_t)o->c;
    int a, j;
    (void)thread;
    for (a = 0; a < o->area; a++, to += o->c)
        for (j = 0; j < o->c; j++) to[j] = (o->accumulate ? to[j] : 0) + from[j] / (float)o->area;
}

typedef struct ckca__subsample {
    const ckca__conv *s;
    const float *from; /* x, or dy */
    float *to;         /* y, or dx */
    int accumulate;
} ckca__subsample;

/* One picture: a row is too little work for a task. */
static void ckca__subsample_picture(void *job, int n, int thread) {
    const ckca__subsample *a = (const ckca__subsample *)job;
    const ckca__conv *s = a->s;
    float *to = a->to + (ptrdiff_t)n * s->p * s->q * s->k;
    int p, q, front = (s->k - s->c) / 2;
    (void)thread;
    memset(to, 0, (size_t)s->p * (size_t)s->q * (size_t)s->k * sizeof *to);
    for (p = 0; p < s->p; p++) {
        const float *from = a->from + ((ptrdiff_t)n * s->h + (ptrdiff_t)p * s->stride) * s->w * s->c;
        for (q = 0; q < s->q; q++, to += s->k, from += (ptrdiff_t)s->stride * s->c)
            memcpy(to + front, from, (size_t)s->c * sizeof *to);
    }
}

static void ckca__subsample_backward_picture(void *job, int n, int thread) {
    const ckca__subsample *a = (const ckca__subsample *)job;
    const ckca__conv *s = a->s;
    float *picture = a->to + (ptrdiff_t)n * s->h * s->w * s->c;
    int p, q, c, front = (s->k - s->c) / 2;
    (void)thread;
    if (!a->accumulate) memset(picture, 0, (size_t)s->h * (size_t)s->w * (size_t)s->c * sizeof *picture);
    for (p = 0; p < s->p; p++) {
        const float *from = a->from + ((ptrdiff_t)n * s->p + p) * s->q * s->k + front;
        float *to = picture + (ptrdiff_t)p * s->stride * s->w * s->c;
        for (q = 0; q < s->q; q++, from += s->k, to += (ptrdiff_t)s->stride * s->c)
            for (c = 0; c < s->c; c++) to[c] += from[c];
    }
}

/* ---- SGD ---- */

static void ckca__naive_sgd(size_t count, float *w, const float *g, float *v, float lr, float momentum,
                            float weight_decay, int nesterov, float gscale) {
    size_t i;
    for (i = 0; i < count; i++) {
        float d = g[i] * gscale + weight_decay * w[i];
        v[i] = momentum * v[i] + d;
        w[i] -= lr * (nesterov ? d + momentum * v[i] : v[i]);
    }
}

/* ===================================================================================================================
   THREADS                                                                                                   >>threads

   ckca__parallel runs a loop of independent tasks on all threads.

   Each thread gets a contiguous range of tasks, the same in every call: tasks run through pictures in order, so a
   thread mostly reads what it wrote itself and still has in its caches. A thread that finishes its range steals from
   the others', starting at the far end. The caller takes part. It waits only for tasks that a thread has claimed, never
   for a worker that has not started: if other processes keep a processor busy, the caller does that worker's tasks
   meanwhile. Waiting threads spin briefly, then sleep. Results must not depend on which thread runs a task.
   =================================================================================================================== */

#if !defined(CKCA_NO_THREADS) && (defined(__unix__) || defined(__APPLE__))
#define CKCA__THREADS
#include <pthread.h>
#include <unistd.h>
/* The unclaimed tasks of one thread: [first, end). Padded, so that each thread's share has its own cache lines. */
typedef struct ckca__share {
    pthread_mutex_t mutex;
    int first, end;
    char padding[128];
} ckca__share;
typedef struct ckca__worker {
    struct ckca__pool *pool;
    int number; /* thread number, 1 and up; 0 is the caller */
    pthread_t thread;
    pthread_cond_t wake; /* tasks or stop: one condition per worker, since a signal to a shared one may wait in glibc */
    int asleep;          /* 1: waiting for wake, and not signalled yet */
    ckca__share share;
} ckca__worker;
typedef struct ckca__pool {
    ckca__share share;                             /* the caller's */
    pthread_mutex_t mutex;                         /* guards finished, calls, stop and asleep */
    pthread_cond_t done;                           /* signalled when all tasks are finished */
    void (*work)(void *job, int task, int thread); /* this, job, tasks and reverse are constant during a call */
    void *job;
    int tasks, reverse; /* of the current or last call; reverse 1: from the last task to the first */
    int finished;       /* finished tasks of this call */
    int calls;          /* number of calls so far; may wrap */
    int stop;
    pthread_mutex_t shared;   /* for ckca__lock; free between calls */
    long process;             /* process that owns the workers; 0: not created yet */
    int workers, max_workers; /* workers running; workers requested */
    ckca__worker worker[1];   /* max_workers elements */
} ckca__pool;
/* Spins until a counter changes, for at most CKCA__SPIN_LIMIT iterations: 25 microseconds, about as long as falling
   asleep and waking up takes, since the 200 calls of a ResNet-20 step mostly follow each other sooner (5% of its time).
   The mutex is held on entry and on return, and released in between. */
#define CKCA__SPIN_LIMIT 1000
static void ckca__pool_spin(ckca__pool *pool, const int *counter) {
#ifdef __GNUC__
    int before = *counter, spins;
    pthread_mutex_unlock(&pool->mutex);
    for (spins = 0; spins < CKCA__SPIN_LIMIT && __atomic_load_n(counter, __ATOMIC_RELAXED) == before; spins++) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb"); /* yield is a no-op on most cores */
#endif
    }
    pthread_mutex_lock(&pool->mutex);
#else
    (void)pool, (void)counter;
#endif
}
/* Stores to a counter that ckca__pool_spin reads. The mutex is held. */
static void ckca__pool_store(int *counter, int value) {
#ifdef __GNUC__
    __atomic_store_n(counter, value, __ATOMIC_RELAXED);
#else
    *counter = value;
#endif
}
static ckca__share *ckca__pool_share(ckca__pool *pool, int thread) {
    return thread ? &pool->worker[thread - 1].share : &pool->share;
}
/* Claims the next task of a share, or the last one if far_end. Returns -1 if none is left. */
static int ckca__pool_claim(const ckca__pool *pool, ckca__share *share, int far_end) {
    int task = -1;
    pthread_mutex_lock(&share->mutex);
    if (share->first < share->end) task = pool->reverse == far_end ? share->first++ : --share->end;
    pthread_mutex_unlock(&share->mutex);
    return task;
}
/* Runs this thread's tasks, then other threads', until all are claimed. Returns the number it ran, all of one call. */
static int ckca__pool_work(ckca__pool *pool, int thread) {
    int threads = pool->workers + 1, ran = 0, i, task;
    for (i = 0; i < threads; i++) {
        ckca__share *share = ckca__pool_share(pool, (thread + i) % threads);
        while ((task = ckca__pool_claim(pool, share, i > 0)) >= 0) {
            pool->work(pool->job, task, thread);
            ran++;
        }
    }
    return ran;
}
static void *ckca__pool_worker(void *argument) {
    ckca__worker *worker = (ckca__worker *)argument;
    ckca__pool *pool = worker->pool;
    pthread_mutex_lock(&pool->mutex); /* by now all workers exist and a call has begun */
    while (!pool->stop) {
        int seen = pool->calls, ran;
        pthread_mutex_unlock(&pool->mutex);
        ran = ckca__pool_work(pool, worker->number);
        pthread_mutex_lock(&pool->mutex);
        if (ran) {
            ckca__pool_store(&pool->finished, pool->finished + ran);
            if (pool->finished == pool->tasks) pthread_cond_signal(&pool->done);
        }
        if (seen == pool->calls && !pool->stop) ckca__pool_spin(pool, &pool->calls);
        if (seen == pool->calls && !pool->stop) {
            worker->asleep = 1;
            pthread_cond_wait(&worker->wake, &pool->mutex);
            worker->asleep = 0;
        }
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}
static void ckca__share_init(ckca__share *share) {
    pthread_mutex_init(&share->mutex, NULL);
    share->first = share->end = 0;
}
/* Locks the pool for a call, and creates the workers before the first call of a process. A forked child has none of its
   parent's workers, and one of them may have held the mutex, so mutexes and conditions are initialised again. If fewer
   workers than requested can be created, those do the work. */
static void ckca__pool_enter(ckca__pool *pool) {
    const long process = (long)getpid();
    const int started = pool->process == process;
    if (!started) pthread_mutex_init(&pool->mutex, NULL);
    pthread_mutex_lock(&pool->mutex);
    if (started) return;
    pool->process = process;
    pthread_cond_init(&pool->done, NULL);
    ckca__share_init(&pool->share);
    for (pool->workers = 0; pool->workers < pool->max_workers; pool->workers++) {
        ckca__worker *worker = &pool->worker[pool->workers];
        worker->pool = pool;
        worker->number = pool->workers + 1;
        worker->asleep = 0;
        ckca__share_init(&worker->share);
        pthread_cond_init(&worker->wake, NULL);
        if (pthread_create(&worker->thread, NULL, ckca__pool_worker, worker)) break;
    }
}
/* ckca__parallel_run on all threads. */
static void ckca__pool_run(ckca__pool *pool, int tasks, int reverse, void (*work)(void *job, int task, int thread),
                           void *job) {
    int shares, woken, i;
    ckca__pool_enter(pool);
    shares = tasks < pool->workers + 1 ? tasks : pool->workers + 1;
    pool->work = work;
    pool->job = job;
    pool->tasks = tasks;
    pool->reverse = reverse;
    ckca__pool_store(&pool->finished, 0);
    ckca__pool_store(&pool->calls, (int)((unsigned)pool->calls + 1));
    for (i = 0; i < shares; i++) { /* all other shares are empty since the last call */
        ckca__share *share = ckca__pool_share(pool, i);
        pthread_mutex_lock(&share->mutex);
        share->first = (int)((int64_t)tasks * i / shares);
        share->end = (int)((int64_t)tasks * (i + 1) / shares);
        pthread_mutex_unlock(&share->mutex);
    }
    for (i = 0, woken = 1; i < pool->workers && woken < tasks; i++) /* one worker per task, less the caller's own */
        if (pool->worker[i].asleep) {
            pool->worker[i].asleep = 0;
            pthread_cond_signal(&pool->worker[i].wake);
            woken++;
        }
    pthread_mutex_unlock(&pool->mutex);
    i = ckca__pool_work(pool, 0);
    pthread_mutex_lock(&pool->mutex);
    ckca__pool_store(&pool->finished, pool->finished + i);
    for (i = -1; pool->finished < tasks && pool->finished != i;) { /* spin as long as other threads make progress */
        i = pool->finished;
        ckca__pool_spin(pool, &pool->finished);
    }
    while (pool->finished < tasks) pthread_cond_wait(&pool->done, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
}
/* Resolves the number of threads that a context asked for: 0 is one per processor. */
static int ckca__pool_threads(int threads) {
    long count = threads ? threads : sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : count > 4096 ? 4096 : (int)count;
}
static size_t ckca__pool_bytes(int threads) {
    return threads > 1 ? sizeof(ckca__pool) + (size_t)(threads - 2) * sizeof(ckca__worker) : 0;
}
/* Makes the pool of ctx->threads threads in zeroed memory of ckca__pool_bytes; none for a single thread. */
static void ckca__pool_init(ckca_context *ctx, void *memory) {
    if (ctx->threads == 1) return;
    ctx->pool = (ckca__pool *)memory;
    ctx->pool->max_workers = ctx->threads - 1;
    pthread_mutex_init(&ctx->pool->shared, NULL);
}
/* Stops and joins the workers, unless a parent process owns them. */
static void ckca__pool_free(ckca_context *ctx) {
    ckca__pool *pool = ctx->pool;
    int i;
    if (!pool) return;
    pthread_mutex_destroy(&pool->shared);
    if (pool->process != (long)getpid()) return;
    pthread_mutex_lock(&pool->mutex);
    pool->stop = 1;
    for (i = 0; i < pool->workers; i++) pthread_cond_signal(&pool->worker[i].wake);
    pthread_mutex_unlock(&pool->mutex);
    for (i = 0; i < pool->workers; i++) {
        pthread_join(pool->worker[i].thread, NULL);
        pthread_cond_destroy(&pool->worker[i].wake);
        pthread_mutex_destroy(&pool->worker[i].share.mutex);
    }
    pthread_mutex_destroy(&pool->share.mutex);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->mutex);
}
/* A task holds this lock while it uses what all tasks share: the user's alloc and release, or a common result. */
static void ckca__lock(ckca_context *ctx) {
    if (ctx->pool) pthread_mutex_lock(&ctx->pool->shared);
}
static void ckca__unlock(ckca_context *ctx) {
    if (ctx->pool) pthread_mutex_unlock(&ctx->pool->shared);
}
/* Threads that run a function of their own beside the pool (the decoders of a feed), the lock that guards what they share
   with the trainer, and two conditions: there is work (0), some of it is done (1). */
typedef struct ckca__crew {
    pthread_mutex_t mutex;
    pthread_cond_t condition[2];
    int threads;         /* running */
    int most;            /* elements of thread */
    pthread_t thread[1]; /* most elements */
} ckca__crew;
static ckca__crew *ckca__crew_new(ckca_context *ctx, int threads) {
    ckca__crew *crew = (ckca__crew *)ckca__alloc(ctx, sizeof *crew + (size_t)threads * sizeof(pthread_t));
    if (!crew) return NULL;
    crew->most = threads;
    pthread_mutex_init(&crew->mutex, NULL);
    pthread_cond_init(&crew->condition[0], NULL);
    pthread_cond_init(&crew->condition[1], NULL);
    return crew;
}
/* Starts as many threads as can be created, each with a job of its own; returns their number. */
static int ckca__crew_start(ckca__crew *crew, void *(*run)(void *job), void *jobs, size_t job_bytes) {
    while (crew->threads < crew->most && !pthread_create(&crew->thread[crew->threads], NULL, run,
                                                         (char *)jobs + (size_t)crew->threads * job_bytes))
        crew->threads++;
    return crew->threads;
}
/* Joins the threads, which must have been told to return, and frees the crew. */
static void ckca__crew_free(ckca_context *ctx, ckca__crew *crew) {
    while (crew->threads) pthread_join(crew->thread[--crew->threads], NULL);
    pthread_cond_destroy(&crew->condition[0]);
    pthread_cond_destroy(&crew->condition[1]);
    pthread_mutex_destroy(&crew->mutex);
    ckca__release(ctx, crew);
}
static void ckca__crew_lock(ckca__crew *crew) { pthread_mutex_lock(&crew->mutex); }
static void ckca__crew_unlock(ckca__crew *crew) { pthread_mutex_unlock(&crew->mutex); }
static void ckca__crew_wait(ckca__crew *crew, int done) { pthread_cond_wait(&crew->condition[done], &crew->mutex); }
static void ckca__crew_wake(ckca__crew *crew, int done) { pthread_cond_broadcast(&crew->condition[done]); }
#else /* everything runs on the caller's thread */
static struct ckca__crew *ckca__crew_new(ckca_context *ctx, int threads) {
    (void)ctx, (void)threads;
    return NULL;
}
static int ckca__crew_start(struct ckca__crew *crew, void *(*run)(void *job), void *jobs, size_t job_bytes) {
    (void)crew, (void)run, (void)jobs, (void)job_bytes;
    return 0;
}
static void ckca__crew_free(ckca_context *ctx, struct ckca__crew *crew) { (void)ctx, (void)crew; }
static void ckca__crew_lock(struct ckca__crew *crew) { (void)crew; }
static void ckca__crew_unlock(struct ckca__crew *crew) { (void)crew; }
static void ckca__crew_wait(struct ckca__crew *crew, int done) { (void)crew, (void)done; }
static void ckca__crew_wake(struct ckca__crew *crew, int done) { (void)crew, (void)done; }
static void ckca__pool_run(struct ckca__pool *pool, int tasks, int reverse,
                           void (*work)(void *job, int task, int thread), void *job) {
    (void)pool, (void)tasks, (void)reverse, (void)work, (void)job;
}
static int ckca__pool_threads(int threads) {
    (void)threads;
    return 1;
}
static size_t ckca__pool_bytes(int threads) {
    (void)threads;
    return 0;
}
static void ckca__pool_init(ckca_context *ctx, void *memory) { (void)ctx, (void)memory; }
static void ckca__pool_free(ckca_context *ctx) { (void)ctx; }
static void ckca__lock(ckca_context *ctx) { (void)ctx; }
static void ckca__unlock(ckca_context *ctx) { (void)ctx; }
#endif

/* Runs work(job, task, thread) once for every task in [0, tasks) and returns when all are done. serial: on the caller's
   thread only; reverse: each thread runs its range from the last task to the first. thread is below ctx->threads and
   unique among concurrent tasks, so it selects scratch memory. Tasks must not call this themselves. */
static void ckca__parallel_run(ckca_context *ctx, int tasks, int serial, int reverse,
                               void (*work)(void *job, int task, int thread), void *job) {
    int i;
    if (ctx->pool && tasks > 1 && !serial)
        ckca__pool_run(ctx->pool, tasks, reverse, work, job);
    else
        for (i = 0; i < tasks; i++) work(job, reverse ? tasks - 1 - i : i, 0);
}

static void ckca__parallel(ckca_context *ctx, int tasks, void (*work)(void *job, int task, int thread), void *job) {
    ckca__parallel_run(ctx, tasks, 0, 0, work, job);
}

/* ===================================================================================================================
   VECTOR KERNELS                                                                                             >>vector

   Each kernel is written once, on vectors of CKCA__VW floats. This file includes itself once per instruction set, named
   by CKCA__PASS; CKCA__NAME(f) gives each copy its own name, and the ops select one with CKCA__DISPATCH. Kernels are
   single-threaded: the ops share work out among threads.
   =================================================================================================================== */

/* An instruction set is a row of ckca__isas, a pass of this file (below) and a line of CKCA__DISPATCH. */
static int ckca__isa_plain(void) { return 1; }
#if defined(CKCA__SIMD) && defined(__x86_64__)
static int ckca__isa_base(void) { return 1; }
static int ckca__isa_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static int ckca__isa_avx512(void) {
    __builtin_cpu_init();
    return ckca__isa_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}
#else
#ifdef CKCA__SIMD
static int ckca__isa_base(void) { return 1; }
#else
#define ckca__isa_base NULL
#endif
#define ckca__isa_avx2 NULL
#define ckca__isa_avx512 NULL
#endif

static const struct {
    const char *name;
    int width;                                     /* floats per vector; plain loops cut work as for 4 */
    int (*supported)(void);                        /* by the processor; NULL: not in this build */
} ckca__isas[CKCA_ISA_COUNT] = {{"best", 0, NULL}, /* not one of its own */
                                {"plain", 4, ckca__isa_plain},
                                {"base", 4, ckca__isa_base},
                                {"avx2", 8, ckca__isa_avx2},
                                {"avx512", 16, ckca__isa_avx512}};

static const char *ckca__isa_name(ckca_isa isa) { return ckca__isas[isa].name; }
static int ckca__isa_supported(ckca_isa isa) { return ckca__isas[isa].supported && ckca__isas[isa].supported(); }

/* The best instruction set that this processor supports. */
static ckca_isa ckca__best_isa(void) {
    int isa = CKCA_ISA_COUNT - 1;
    while (!ckca__isa_supported((ckca_isa)isa)) isa--;
    return (ckca_isa)isa;
}

#ifdef CKCA__SIMD

#define CKCA__INLINE static inline __attribute__((always_inline))
#define CKCA__NOINLINE static __attribute__((noinline))
#ifdef __clang__
#define CKCA__UNROLL _Pragma("clang loop unroll(full)")
#define CKCA__ROLL _Pragma("clang loop unroll(disable)")
#else
#define CKCA__UNROLL _Pragma("GCC unroll 16")
#define CKCA__ROLL _Pragma("GCC unroll 1")
#endif

enum {
    CKCA__CONV_MAX_STRIDE = 8,   /* largest stride of the vector kernels: phases per axis */
    CKCA__CONV_REGION = 1 << 16, /* floats of source per task */
    CKCA__CONV_TASKS = 16,       /* tasks of the forward pass and the input gradient, at least, if possible */
    CKCA__CONV_LIST = 240,       /* output pixels per list, which runs through all weights: whole tiles */
    CKCA__CONV_PIXELS = 256,     /* weight gradient: output pixels per region, and at least per group */
    CKCA__CONV_PANELS = 1 << 17, /* weight gradient: floats of panels, which fit L2 */
    CKCA__CONV_GROUPS = 8,       /* weight gradient: tasks, at least, if possible */
    CKCA__CONV_PARTIAL = 1 << 19 /* weight gradient: floats of partial sums of all groups */
};

/* The forward pass and the input gradient are both a correlation: output i along an axis is the sum over taps t of a
   weight times source i step + from + t, or zero outside. The input gradient of a convolution of stride s splits into s
   phases per axis: every s-th pixel of dx is multiplied with the same taps of w. */
typedef struct ckca__axis {
    int taps, first, before; /* number of taps; the first one's index in w; taps of all earlier phases */
    int from;                /* source coordinate of output 0 under its first tap */
    int at, count;           /* the phase has count outputs, at pixels at, at + spread, ... */
} ckca__axis;

typedef struct ckca__conv_job {
    ckca_isa isa;
    int n, h, w, c;         /* source: N x H x W x C */
    int oh, ow, k;          /* output: N x OH x OW x K */
    int r, s;               /* taps of w along y and x */
    int step, spread;       /* source pixels per output pixel; output pixels from one of a phase to the next */
    int tap_step;           /* from one tap to the next in w: 1, or -spread in the input gradient */
    ptrdiff_t tap, in, out; /* strides in w, in floats, of a tap, a source channel and an output channel */
    ckca__axis y[CKCA__CONV_MAX_STRIDE], x[CKCA__CONV_MAX_STRIDE]; /* spread phases each; 0 has the most outputs */
    int top, left, extra_h; /* origin of a task's source region relative to its first output; extra rows */
    int width;              /* of a region, in pixels */
    int in_place;           /* 1: the region needs no zero padding and is read from the source itself */
    int pictures, rows;     /* outputs per task and phase */
    int list;               /* output pixels per list, see CKCA__CONV_LIST */
    int copy_pixels;        /* 1: a list's pixels are copied first: cache conflicts, or a norm */
    ptrdiff_t next_offset;  /* from a task's source to that of its thread's likely next task; 0: unknown */
    const ckca__norm *norm; /* applied to the source, or NULL */
    const float *source, *weights, *bias, *residual;
    float *output, *packed, *scratch;
    size_t scratch_size; /* floats per thread */
    int relu;
} ckca__conv_job;

/* What all tiles of one block of output channels share. */
typedef struct ckca__block {
    const ckca__conv_job *job;
    int r, j;                    /* rows of taps; values per row (S C) */
    ptrdiff_t pitch;             /* floats from one source row to the next */
    const float *weights, *bias; /* packed weights, r x j x vectors; bias, vectors. Zero-padded to whole vectors */
    int first, channels;         /* first output channel; number of output channels */
    const float *next;           /* memory to prefetch: */
    int lines;                   /* this many cache lines per 16 steps of the reduction */
} ckca__block;

/* The weight gradient is a matrix product, rows x lanes, reduced over pixels. Rows are dy's channels and lanes are x's,
   one tap at a time. If x has too few channels to fill a vector the operands are swapped: rows are x's channels under
   all taps, lanes are dy's channels. */
typedef struct ckca__wgrad_job {
    ckca_isa isa;
    ckca__conv s;
    int swap, rows, lanes;
    int groups;                /* of output pixels */
    int task_rows, task_lanes; /* per task, at most */
    int row_tasks, lane_tasks; /* tasks along each side */
    int pixels;                /* per region, at most */
    int partial;               /* 1: each group has its own sums; 0: there is one group, which adds to dw directly */
    const float *x, *dy;
    float *sums; /* groups x K x R x S x C; swapped: groups x R x S x C x K */
    float *dw, *scratch;
    size_t scratch_size;               /* floats per thread. It holds panels of rows, then at these offsets: */
    size_t at_b, at_zeros, at_patches; /* panels of lanes; zeros, one per lane; swapped: patches */
} ckca__wgrad_job;

/* out[row][lane] += the sum over pixels of a[pixel][row] b[pixel][lane], both in panels: [panel][pixel][value]. */
typedef struct ckca__outer {
    int pixels, rows, lanes;
    const float *a, *b;
    float *out;
    ptrdiff_t pitch;              /* floats from one row of out to the next */
    const float *next_a, *next_b; /* prefetched meanwhile: first source pixels of the next panels; or NULL */
    ptrdiff_t step_a, step_b;     /* floats from such a pixel to the next */
} ckca__outer;

/* Floats from one panel to the next. Never a multiple of 4 KiB, which would map all panels to the same lines of L1. */
static ptrdiff_t ckca__panel_pitch(int size, int pixels) { return (ptrdiff_t)size * pixels + 16; }

/* Winograd's algorithm, explained at its kernels. Transformed pixels (and dy) are stored as [point][group of
   tiles][vector of channels][tile], one vector each, so that products read them in order. A group is the tiles of one
   register tile; in the weight gradient, all tiles of a block. */
enum {
    CKCA__WINO_ELEMENTS = 36,     /* transformed weights per channel pair; pixels have 81 at stride 2 */
    CKCA__WINO_BLOCK = 160 << 10, /* floats of a block of tiles in the transform domain, as a target */
    CKCA__WINO_TASKS = 16,        /* tasks of a pass, if possible */
    CKCA__WINO_SUMS = 5 << 17     /* weight gradient: floats of a task's sums in the transform domain */
};
/* What a transform reads; _2: at stride 2. */
enum {
    CKCA__WINO_KIND_SOURCE,
    CKCA__WINO_KIND_DY,
    CKCA__WINO_KIND_SOURCE_2,
    CKCA__WINO_KIND_DY_2,
    CKCA__WINO_KIND_DX_2
};
typedef struct ckca__wino_maps {
    const float *at;
    int h, w, c;            /* N x H x W x C maps */
    int step;               /* pixels from one tile to the next */
    int pad;                /* the first tile starts this far outside */
    int channels;           /* to transform, from at on */
    const ckca__norm *norm; /* or NULL; if set, at is channel 0 */
} ckca__wino_maps;
typedef struct ckca__wino_job {
    ckca_isa isa;
    ckca__wino_maps source, dy; /* dy: weight gradient only */
    int c, oh, ow, k;           /* source channels; output: N x OH x OW x K */
    int stride;
    int rotated180;          /* 1: input gradient: weights are rotated by 180 degrees */
    int axis, elements;      /* points of a tile along an axis; in all */
    int outputs;             /* output pixels of a tile along an axis */
    int across, down, tiles; /* tiles per row; per column; in all */
    int parts, ranges;       /* tasks: parts of the tiles x ranges of output channels */
    int block;               /* tiles per block, which is transformed, multiplied and transformed back at once */
    const float *weights, *bias, *residual;
    float *output; /* weight gradient: dw */
    float *sums;   /* weight gradient: parts x K x 3 x 3 x C, or dw itself if parts is 1 */
    float *packed; /* transformed weights, [block of channels][point][c][channels]; NULL: per task */
    float *scratch;
    size_t scratch_size; /* floats per thread */
    int relu;
} ckca__wino_job;

/* Floats from one point of a block of tiles to the next. Never a multiple of 4 KiB, which would map all points to the
   same lines of L1. */
static ptrdiff_t ckca__wino_pitch(int block, int channels) { return (ptrdiff_t)block * channels + 16; }

/* A batch norm's constants, repeated to fill rows of cols values: see "all other ops" below. */
typedef struct ckca__norm_table {
    const float *mean, *scale, *beta;
    int relu;
} ckca__norm_table;

/* Index of the transformed weights (6 x 6) that an element of the transformed pixels is multiplied with: along an axis
   0 to 4, then 5 for all others. */
static int ckca__wino_weight_index(const ckca__wino_job *job, int element) {
    int i = element / job->axis, j = element % job->axis;
    return (i < 5 ? i : 5) * 6 + (j < 5 ? j : 5);
}

#ifndef CKCA_FILE
#define CKCA_FILE "ckca.h" /* define this if you rename the header */
#endif
#ifdef __x86_64__
#include <immintrin.h>
#define CKCA__PASS 512
#include CKCA_FILE
#undef CKCA__PASS
#define CKCA__PASS 256
#include CKCA_FILE
#undef CKCA__PASS
#else
#include <arm_neon.h>
#endif
#define CKCA__PASS 128
#include CKCA_FILE
#undef CKCA__PASS
#ifdef __x86_64__
#define CKCA__DISPATCH(ctx, name, args)       \
    do {                                      \
        if ((ctx)->isa == CKCA_ISA_AVX512)    \
            name##_512 args;                  \
        else if ((ctx)->isa == CKCA_ISA_AVX2) \
            name##_256 args;                  \
        else                                  \
            name##_128 args;                  \
    } while (0)
#else
#define CKCA__DISPATCH(ctx, name, args) name##_128 args
#endif
#endif /* CKCA__SIMD */

#endif /* CKCA__LIBRARY */
#else  /* CKCA__PASS: the kernels of one instruction set */

#if CKCA__PASS == 512
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx2,fma")
#endif
#define CKCA__NAME(f) f##_512
#define CKCA__VW 16
#define CKCA__V __m512
#define CKCA__LOAD(p) _mm512_loadu_ps(p)
#define CKCA__STORE(p, v) _mm512_storeu_ps(p, v)
#define CKCA__SET(s) _mm512_set1_ps(s)
#define CKCA__ADD(a, b) _mm512_add_ps(a, b)
#define CKCA__SUB(a, b) _mm512_sub_ps(a, b)
#define CKCA__MUL(a, b) _mm512_mul_ps(a, b)
#define CKCA__FMA(a, b, c) _mm512_fmadd_ps(a, b, c)              /* a b + c */
#define CKCA__MAX(a, b) _mm512_maskz_max_ps((__mmask16)-1, a, b) /* g++ 12 warns about _mm512_max_ps itself */
/* a where y > 0, else 0 */
#define CKCA__WHERE_POSITIVE(y, a) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_GT_OQ), a)
#elif CKCA__PASS == 256
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define CKCA__NAME(f) f##_256
#define CKCA__VW 8
#define CKCA__V __m256
#define CKCA__LOAD(p) _mm256_loadu_ps(p)
#define CKCA__STORE(p, v) _mm256_storeu_ps(p, v)
#define CKCA__SET(s) _mm256_set1_ps(s)
#define CKCA__ADD(a, b) _mm256_add_ps(a, b)
#define CKCA__SUB(a, b) _mm256_sub_ps(a, b)
#define CKCA__MUL(a, b) _mm256_mul_ps(a, b)
#define CKCA__FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define CKCA__MAX(a, b) _mm256_max_ps(a, b)
#define CKCA__WHERE_POSITIVE(y, a) _mm256_and_ps(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_GT_OQ), a)
#elif defined(__x86_64__)
#define CKCA__NAME(f) f##_128
#define CKCA__VW 4
#define CKCA__V __m128
#define CKCA__LOAD(p) _mm_loadu_ps(p)
#define CKCA__STORE(p, v) _mm_storeu_ps(p, v)
#define CKCA__SET(s) _mm_set1_ps(s)
#define CKCA__ADD(a, b) _mm_add_ps(a, b)
#define CKCA__SUB(a, b) _mm_sub_ps(a, b)
#define CKCA__MUL(a, b) _mm_mul_ps(a, b)
#define CKCA__FMA(a, b, c) _mm_add_ps(_mm_mul_ps(a, b), c)
#define CKCA__MAX(a, b) _mm_max_ps(a, b)
#define CKCA__WHERE_POSITIVE(y, a) _mm_and_ps(_mm_cmpgt_ps(y, _mm_setzero_ps()), a)
#else
#define CKCA__NAME(f) f##_128
#define CKCA__VW 4
#define CKCA__V float32x4_t
#define CKCA__LOAD(p) vld1q_f32(p)
#define CKCA__STORE(p, v) vst1q_f32(p, v)
#define CKCA__SET(s) vdupq_n_f32(s)
#define CKCA__ADD(a, b) vaddq_f32(a, b)
#define CKCA__SUB(a, b) vsubq_f32(a, b)
#define CKCA__MUL(a, b) vmulq_f32(a, b)
#define CKCA__FMA(a, b, c) vfmaq_f32(c, a, b)
#define CKCA__MAX(a, b) vmaxq_f32(a, b)
#define CKCA__WHERE_POSITIVE(y, a) \
    vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(y, vdupq_n_f32(0)), vreinterpretq_u32_f32(a)))
#endif

/* ---- convolution ----

   All passes accumulate register tiles of 12 x 32 sums: 24 of 32 registers (with 16 registers: 6 x 2 vectors, 12). A
   step of the reduction loads 32 values of one operand and broadcasts 12 of the other for 24 multiply-adds, so with
   operands in L1 or L2 arithmetic is the limit. The remaining cost is memory: a tile that is the first to read its
   source stalls. So tiles prefetch into L2, a line or a few every 16 steps, what their thread will read next.

   Forward pass and input gradient: 12 pixels x 32 output channels. A task reads its region of the source in place if
   that needs no padding. Otherwise it first copies the region, of 256 KiB so that it stays in L2, with zeros around it:
   the inner loop then needs no bounds checks, and the S C values under a row of taps are contiguous. Weights are packed
   in the order of that loop, 32 output channels at a time (72 KiB for 3 x 3 x 64, 576 KiB for 3 x 3 x 512), and are
   streamed from L2 well below its bandwidth. Pixels that are 4 KiB apart (1024 channels) would compete for the same
   lines of L1, so their values are copied to scratch first.

   Weight gradient: 12 output channels x 32 source channels of one tap, reduced over pixels, in regions of 256 pixels.
   Both operands are first packed into panels, 12 or 32 channels of all pixels, which a tile reads in order.

   If x has a norm (ckca__conv), the first code that moves x applies it: the copy of a region or list, the packing of
   panels, or Winograd's transform. That saves batch norm's write and the read that would follow it. */

#if CKCA__PASS == 512 || defined(__aarch64__) /* 32 registers: 12 pixels x 2 vectors of sums; with 16 registers 6 x 2 */
#define CKCA__TILE 4
#else
#define CKCA__TILE 2
#endif
#define CKCA__CHANNEL_BLOCK (2 * CKCA__VW) /* output channels per block: two vectors */

/* Normalises channels c to c + CKCA__VW of x with batch norm's own operations, and so to the same bits. */
CKCA__INLINE CKCA__V CKCA__NAME(ckca__norm)(const ckca__norm *norm, int c, CKCA__V x) {
    CKCA__V scale = CKCA__MUL(CKCA__LOAD(norm->gamma + c), CKCA__LOAD(norm->inv_std + c));
    x = CKCA__FMA(CKCA__SUB(x, CKCA__LOAD(norm->mean + c)), scale, CKCA__LOAD(norm->beta + c));
    return norm->relu ? CKCA__MAX(CKCA__SET(0.0f), x) : x; /* in this order NaN passes through */
}

/* Copies values of one pixel, starting at channel c, and normalises them if there is a norm. */
CKCA__INLINE void CKCA__NAME(ckca__norm_copy)(const ckca__norm *norm, int c, int values, const float *from, float *to) {
    int i;
    if (!norm)
        memcpy(to, from, sizeof *to * (size_t)values);
    else
        for (i = 0; i < values; i += CKCA__VW)
            CKCA__STORE(to + i, CKCA__NAME(ckca__norm)(norm, c + i, CKCA__LOAD(from + i)));
}

/* Offset of a phase's packed weights, in floats. */
static ptrdiff_t CKCA__NAME(ckca__conv_packed_offset)(const ckca__conv_job *job, const ckca__axis *y,
                                                      const ckca__axis *x) {
    return ((ptrdiff_t)y->before * job->s + (ptrdiff_t)y->taps * x->before) * job->c *
           (ptrdiff_t)ckca__round_up((size_t)job->k, CKCA__VW);
}

/* Packs the weights of one block of output channels of phase (a, b): taps x source channels x output channels,
   zero-padded to whole vectors. */
static void CKCA__NAME(ckca__conv_pack)(const ckca__conv_job *job, int a, int b, int first) {
    const ckca__axis *y = &job->y[a], *x = &job->x[b];
    int channels = job->k - first < CKCA__CHANNEL_BLOCK ? job->k - first : CKCA__CHANNEL_BLOCK, r, s, c, k, i, line;
    int wide = channels > CKCA__VW ? CKCA__CHANNEL_BLOCK : CKCA__VW;
    float *to =
        job->packed + CKCA__NAME(ckca__conv_packed_offset)(job, y, x) + (ptrdiff_t)first * y->taps * x->taps * job->c;
    for (r = 0; r < y->taps; r++)
        for (s = 0; s < x->taps; s++) {
            const float *from = job->weights + first * job->out +
                                job->tap * ((y->first + r * job->tap_step) * job->s + x->first + s * job->tap_step);
            for (c = 0; c < job->c; c += line, to += line * wide, from += line * job->in) {
                line = job->c - c < 16 ? job->c - c : 16; /* one cache line at a time */
                if (job->out == 1)
                    for (i = 0; i < line; i++) {
                        __builtin_prefetch(from + (i + 16) * job->in);
                        __builtin_prefetch(from + (i + 16) * job->in + 16);
                        memcpy(to + i * wide, from + i * job->in, sizeof *to * (size_t)channels);
                    }
                else
                    for (k = 0; k < channels; k++) {
                        __builtin_prefetch(from + k * job->out + 32);
                        for (i = 0; i < line; i++) to[i * wide + k] = from[k * job->out + i];
                    }
                for (i = 0; i < line; i++) memset(to + i * wide + channels, 0, sizeof *to * (size_t)(wide - channels));
            }
        }
}

/* Epilogue of a pixel whose output channels do not fill whole vectors: bias, residual, ReLU. */
static void CKCA__NAME(ckca__conv_epilogue)(const ckca__block *b, const float *sums, float *y) {
    const ckca__conv_job *job = b->job;
    int i;
    for (i = 0; i < b->channels; i++) {
        float sum = sums[i] + b->bias[i];
        if (job->residual) sum += job->residual[y + i - job->output];
        y[i] = job->relu && sum < 0 ? 0 : sum; /* NaN passes through */
    }
}

/* The inner loop of the forward pass and the input gradient: P pixels x V vectors of sums stay in registers throughout
   the reduction over taps and source channels (P and V are constants after inlining). If count is below P, the last
   pixel stands in for the missing ones and their sums are dropped. Every tile size adds up in the same order. */
CKCA__INLINE void CKCA__NAME(ckca__conv_tile)(const int P, const int V, const ckca__block *b, int count,
                                              const float *const *from, float *const *to) {
    const ckca__conv_job *job = b->job;
    CKCA__V sum[3 * CKCA__TILE][2];
    const float *x[3 * CKCA__TILE], *w = b->weights, *next = b->next;
    float tile[3 * CKCA__TILE][CKCA__CHANNEL_BLOCK];
    int p, v, r, i, j;
    CKCA__UNROLL for (p = 0; p < P; p++) {
        const float *y = to[p < count ? p : count - 1] + b->first; /* prefetch the outputs for the epilogue */
        x[p] = from[p < count ? p : count - 1];
        CKCA__UNROLL for (v = 0; v < V; v++) {
            __builtin_prefetch(y + v * CKCA__VW, 1);
            if (job->residual) __builtin_prefetch(job->residual + (y - job->output) + v * CKCA__VW);
            sum[p][v] = CKCA__SET(0.0f);
        }
    }
    for (r = 0; r < b->r; r++) {
        for (j = 0; j < b->j;) {
            int end = b->j - j < 16 ? b->j : j + 16;
            for (i = 0; i < b->lines; i++, next += 16) __builtin_prefetch(next, 0, 2);
            for (; j < end; j++, w += V * CKCA__VW) {
                CKCA__V weight[2];
                CKCA__UNROLL for (v = 0; v < V; v++) weight[v] = CKCA__LOAD(w + v * CKCA__VW);
                CKCA__UNROLL for (p = 0; p < P; p++) {
                    CKCA__V value = CKCA__SET(x[p][j]);
                    CKCA__UNROLL for (v = 0; v < V; v++) sum[p][v] = CKCA__FMA(value, weight[v], sum[p][v]);
                }
            }
        }
        CKCA__UNROLL for (p = 0; p < P; p++) x[p] += b->pitch;
    }
    if (b->channels == V * CKCA__VW) {
        CKCA__V bias[2];
        CKCA__UNROLL for (v = 0; v < V; v++) bias[v] = CKCA__LOAD(b->bias + v * CKCA__VW);
        CKCA__UNROLL for (p = 0; p < P; p++) {
            if (p < count) {
                float *y = to[p] + b->first;
                CKCA__UNROLL for (v = 0; v < V; v++) sum[p][v] = CKCA__ADD(sum[p][v], bias[v]);
                if (job->residual) {
                    const float *residual = job->residual + (y - job->output);
                    CKCA__UNROLL for (v = 0; v < V; v++) sum[p][v] =
                        CKCA__ADD(sum[p][v], CKCA__LOAD(residual + v * CKCA__VW));
                }
                if (job->relu) { /* in this order NaN passes through */
                    CKCA__UNROLL for (v = 0; v < V; v++) sum[p][v] = CKCA__MAX(CKCA__SET(0.0f), sum[p][v]);
                }
                CKCA__UNROLL for (v = 0; v < V; v++) CKCA__STORE(y + v * CKCA__VW, sum[p][v]);
            }
        }
        return;
    }
    CKCA__UNROLL for (p = 0; p < P; p++) {
        CKCA__UNROLL for (v = 0; v < V; v++) CKCA__STORE(tile[p] + v * CKCA__VW, sum[p][v]);
    }
    for (p = 0; p < P && p < count; p++) CKCA__NAME(ckca__conv_epilogue)(b, tile[p], to[p] + b->first);
}

/* One function per tile size: all sizes in one function degrade the compilers' register allocation. */
#define CKCA__CONV_TILE(T, V)                                                                                         \
    CKCA__NOINLINE void CKCA__NAME(ckca__conv_tile_##T##V)(const ckca__block *b, int count, const float *const *from, \
                                                           float *const *to) {                                        \
        CKCA__NAME(ckca__conv_tile)(T * CKCA__TILE, V, b, count, from, to);                                           \
    }
CKCA__CONV_TILE(1, 1)
CKCA__CONV_TILE(1, 2)
CKCA__CONV_TILE(2, 1)
CKCA__CONV_TILE(2, 2)
CKCA__CONV_TILE(3, 1)
CKCA__CONV_TILE(3, 2)
#undef CKCA__CONV_TILE

/* Computes count output pixels, given by their sources (from) and outputs (to), for all blocks of output channels, tile
   by tile. The tiles prefetch the sources of as many pixels from next on, unless it is NULL. */
static void CKCA__NAME(ckca__conv_list)(const ckca__conv_job *job, const ckca__axis *y, const ckca__axis *x,
                                        ptrdiff_t pitch, int count, const float *const *from, float *const *to,
                                        const float *next, float *scratch) {
    static void (*const tile[3][2])(const ckca__block *, int, const float *const *, float *const *) = {
        {CKCA__NAME(ckca__conv_tile_11), CKCA__NAME(ckca__conv_tile_12)},
        {CKCA__NAME(ckca__conv_tile_21), CKCA__NAME(ckca__conv_tile_22)},
        {CKCA__NAME(ckca__conv_tile_31), CKCA__NAME(ckca__conv_tile_32)}};
    ptrdiff_t per = (ptrdiff_t)y->taps * x->taps * job->c;
    int lines = (3 * CKCA__TILE * CKCA__CHANNEL_BLOCK + job->k - 1) / job->k; /* all within the last block */
    const float *copies[CKCA__CONV_LIST], *end = next ? next + (ptrdiff_t)count * job->c : NULL;
    float bias[CKCA__CHANNEL_BLOCK];
    ckca__block b;
    int i, size;
    if (job->copy_pixels && per == job->c) {
        for (i = 0; i < count; i++, scratch += job->c + 16) {
            CKCA__NAME(ckca__norm_copy)(job->norm, 0, job->c, from[i], scratch);
            copies[i] = scratch;
        }
        from = copies;
    }
    b.job = job;
    b.r = y->taps;
    b.j = x->taps * job->c;
    b.pitch = pitch;
    b.bias = bias;
    b.weights = job->packed + CKCA__NAME(ckca__conv_packed_offset)(job, y, x);
    for (b.first = 0; b.first < job->k; b.first += CKCA__CHANNEL_BLOCK, b.weights += CKCA__CHANNEL_BLOCK * per) {
        int two = job->k - b.first > CKCA__VW;
        b.channels = job->k - b.first < CKCA__CHANNEL_BLOCK ? job->k - b.first : CKCA__CHANNEL_BLOCK;
        memset(bias, 0, sizeof bias);
        if (job->bias) memcpy(bias, job->bias + b.first, sizeof *bias * (size_t)b.channels);
        for (i = 0; i < count; i += size) {
            int left = count - i;
            b.next = next;
            b.lines = next < end ? lines : 0;
            if (b.lines) next += (ptrdiff_t)b.lines * ((b.j + 15) / 16) * b.r * 16;
            size = left > 2 * CKCA__TILE ? 3 : left > CKCA__TILE ? 2 : 1;
            tile[size - 1][two](&b, left, from + i, to + i);
            size *= CKCA__TILE;
        }
    }
}

/* One task: the outputs of some rows of some pictures, in all phases. */
static void CKCA__NAME(ckca__conv_task)(const ckca__conv_job *job, int task, float *scratch) {
    int bands = (job->y[0].count + job->rows - 1) / job->rows, n0 = task / bands * job->pictures;
    int i0 = task % bands * job->rows, pictures = job->n - n0 < job->pictures ? job->n - n0 : job->pictures;
    int rows = job->y[0].count - i0 < job->rows ? job->y[0].count - i0 : job->rows;
    int top = i0 * job->step + job->top, height = (rows - 1) * job->step + job->extra_h, width = job->width;
    const float *region = scratch, *next = NULL, *end = job->source + (ptrdiff_t)job->n * job->h * job->w * job->c;
    int n, i, j, a, b;
    if (job->in_place) {
        region = job->source + (((ptrdiff_t)n0 * job->h + top) * job->w + job->left) * job->c;
        height = job->h;
        width = job->w;
    } else { /* copy the region, zero-padded */
        int l = job->left < 0 ? -job->left : 0, right = job->w - job->left, c = job->c;
        int middle = (right < width ? right : width) - l;
        float *to = scratch;
        if (l > width) l = width;
        if (middle < 0) middle = 0;
        for (n = n0; n < n0 + pictures; n++)
            for (i = top; i < top + height; i++, to += (ptrdiff_t)width * c) {
                int inside = i >= 0 && i < job->h ? middle : 0;
                memset(to, 0, sizeof *to * (size_t)l * (size_t)c);
                if (inside) {
                    const float *from = job->source + (((ptrdiff_t)n * job->h + i) * job->w + job->left + l) * c;
                    if (!job->norm)
                        memcpy(to + l * c, from, sizeof *to * (size_t)inside * (size_t)c);
                    else
                        for (j = 0; j < inside; j++)
                            CKCA__NAME(ckca__norm_copy)(job->norm, 0, c, from + j * c, to + (l + j) * c);
                }
                memset(to + (l + inside) * c, 0, sizeof *to * (size_t)(width - l - inside) * (size_t)c);
            }
    }
    for (a = 0; a < job->spread; a++)
        for (b = 0; b < job->spread; b++) {
            const ckca__axis *y = &job->y[a], *x = &job->x[b];
            const float *from[CKCA__CONV_LIST];
            float *to[CKCA__CONV_LIST];
            int count = 0;
            if (job->next_offset && end - region > (ptrdiff_t)job->next_offset) next = region + job->next_offset;
            for (n = 0; n < pictures; n++)
                for (i = 0; i < rows && i0 + i < y->count; i++) {
                    const float *source =
                        region +
                        (((ptrdiff_t)n * height + i * job->step + y->from - job->top) * width + x->from - job->left) *
                            job->c;
                    float *output =
                        job->output +
                        (((ptrdiff_t)(n0 + n) * job->oh + y->at + (i0 + i) * job->spread) * job->ow + x->at) * job->k;
                    for (j = 0; j < x->count; j++, source += job->step * job->c, output += job->spread * job->k) {
                        from[count] = source;
                        to[count] = output;
                        if (++count == job->list) {
                            const float *ahead = job->next_offset && i + 1 < rows ? source + job->c : next;
                            CKCA__NAME(ckca__conv_list)
                            (job, y, x, (ptrdiff_t)width * job->c, count, from, to, ahead, scratch);
                            count = 0;
                        }
                    }
                }
            CKCA__NAME(ckca__conv_list)(job, y, x, (ptrdiff_t)width * job->c, count, from, to, next, scratch);
        }
}

/* Packs the values of count pixels, pitch floats apart, into panels of WIDE values; the last panel has as many UNITs as
   it needs. The first pixel is number at of `pixels`. With a norm, values is a multiple of the vector size and c is the
   first channel. */
CKCA__INLINE void CKCA__NAME(ckca__panels)(const int WIDE, const int UNIT, int pixels, int at, int count, int values,
                                           const ckca__norm *norm, int c, const float *from, ptrdiff_t pitch,
                                           float *to) {
    for (; count > 0; count--, at++, from += pitch) {
        float *panel = to;
        int left = values, i;
        for (i = 0; left >= WIDE; left -= WIDE, i += WIDE, panel += ckca__panel_pitch(WIDE, pixels))
            CKCA__NAME(ckca__norm_copy)(norm, c + i, WIDE, from + i, panel + at * WIDE);
        panel += at * ((left + UNIT - 1) / UNIT * UNIT);
        for (; left >= UNIT; left -= UNIT, i += UNIT, panel += UNIT)
            CKCA__NAME(ckca__norm_copy)(norm, c + i, UNIT, from + i, panel);
        if (left > 0) memcpy(panel, from + i, sizeof *to * (size_t)left); /* the rest of the UNIT is never stored */
    }
}
static void CKCA__NAME(ckca__row_panels)(int pixels, int values, const float *from, ptrdiff_t pitch, float *to) {
    CKCA__NAME(ckca__panels)(3 * CKCA__TILE, CKCA__TILE, pixels, 0, pixels, values, NULL, 0, from, pitch, to);
}
static void CKCA__NAME(ckca__lane_panels)(int pixels, int at, int count, int values, const float *from, ptrdiff_t pitch,
                                          float *to) {
    CKCA__NAME(ckca__panels)(CKCA__CHANNEL_BLOCK, CKCA__VW, pixels, at, count, values, NULL, 0, from, pitch, to);
}
static void CKCA__NAME(ckca__norm_panels)(int pixels, int at, int count, int values, const ckca__norm *norm, int c,
                                          const float *from, ptrdiff_t pitch, float *to) {
    CKCA__NAME(ckca__panels)(CKCA__CHANNEL_BLOCK, CKCA__VW, pixels, at, count, values, norm, c, from, pitch, to);
}

/* Clips [*begin, *end) to the outputs of an axis whose tap lies inside the source. */
static void CKCA__NAME(ckca__conv_inside)(int tap, int pad, int stride, int size, int *begin, int *end) {
    int low = pad > tap ? (pad - tap + stride - 1) / stride : 0, high = size - 1 + pad - tap;
    high = high < 0 ? 0 : high / stride + 1;
    if (*begin < low) *begin = low;
    if (*end > high) *end = high;
}

/* Packs what output pixels from first on read under tap (r, t): x's channels from lane on. */
static void CKCA__NAME(ckca__conv_lanes)(const ckca__wgrad_job *job, ptrdiff_t first, int pixels, int r, int t,
                                         int lane, int lanes, const float *zeros, float *to) {
    const ckca__conv *s = &job->s;
    int picture = (int)(first / ((ptrdiff_t)s->p * s->q)), p = (int)(first / s->q % s->p), q = (int)(first % s->q),
        at = 0;
    while (at < pixels) {
        int end = s->q - q < pixels - at ? s->q : q + pixels - at, left = q, right = end;
        int y = p * s->stride - s->pad + r;
        const float *row = job->x + ((ptrdiff_t)picture * s->h + y) * s->w * s->c + lane;
        CKCA__NAME(ckca__conv_inside)(t, s->pad, s->stride, s->w, &left, &right);
        if (y < 0 || y >= s->h || right <= left) left = right = end;
        CKCA__NAME(ckca__lane_panels)(pixels, at, left - q, lanes, zeros, 0, to);
        row += (ptrdiff_t)(left * s->stride - s->pad + t) * s->c;
        if (s->norm) {
            CKCA__NAME(ckca__norm_panels)
            (pixels, at + left - q, right - left, lanes, s->norm, lane, row, (ptrdiff_t)s->stride * s->c, to);
        } else {
            CKCA__NAME(ckca__lane_panels)
            (pixels, at + left - q, right - left, lanes, row, (ptrdiff_t)s->stride * s->c, to);
        }
        CKCA__NAME(ckca__lane_panels)(pixels, at + right - q, end - right, lanes, zeros, 0, to);
        at += end - q;
        q = 0;
        if (++p == s->p) {
            p = 0;
            picture++;
        }
    }
}

/* im2col: the patch of R x S x C values that each output pixel from first on reads. */
static void CKCA__NAME(ckca__conv_patches)(const ckca__wgrad_job *job, ptrdiff_t first, int pixels, float *to) {
    const ckca__conv *s = &job->s;
    int wide = s->s * s->c, r, i;
    for (; pixels > 0; pixels--, first++) {
        int y = (int)(first / s->q % s->p) * s->stride - s->pad, x = (int)(first % s->q) * s->stride - s->pad;
        int low = x < 0 ? -x : 0, high = s->w - x < s->s ? s->w - x : s->s;
        for (r = 0; r < s->r; r++, y++, to += wide) {
            const float *from = job->x + ((first / ((ptrdiff_t)s->p * s->q) * s->h + y) * s->w + x) * s->c;
            if (y < 0 || y >= s->h || high <= low)
                memset(to, 0, sizeof *to * (size_t)wide);
            else if (high - low == s->s && wide >= CKCA__VW) {
                for (i = 0; i + CKCA__VW <= wide; i += CKCA__VW) CKCA__STORE(to + i, CKCA__LOAD(from + i));
                CKCA__STORE(to + wide - CKCA__VW, CKCA__LOAD(from + wide - CKCA__VW));
            } else {
                memset(to, 0, sizeof *to * (size_t)wide);
                memcpy(to + low * s->c, from + low * s->c, sizeof *to * (size_t)(high - low) * (size_t)s->c);
            }
        }
    }
}

/* The inner loop of the weight gradient: A rows x V vectors of sums stay in registers throughout the reduction over
   pixels. Only the existing rows and lanes are stored. Every pixel prefetches one line of next. */
CKCA__INLINE void CKCA__NAME(ckca__outer_tile)(const int A, const int V, int pixels, const float *a, const float *b,
                                               int rows, int lanes, float *out, ptrdiff_t pitch, const float *next,
                                               ptrdiff_t step) {
    CKCA__V sum[3 * CKCA__TILE][2];
    int i, v;
    CKCA__UNROLL for (i = 0; i < A; i++) {
        CKCA__UNROLL for (v = 0; v < V; v++) {
            __builtin_prefetch(out + (i < rows ? i : 0) * pitch + v * CKCA__VW, 1);
            sum[i][v] = CKCA__SET(0.0f);
        }
    }
    for (; pixels > 0; pixels--, a += A, b += V * CKCA__VW, next += step) {
        CKCA__V value[2];
        if (step) __builtin_prefetch(next, 0, 2);
        CKCA__UNROLL for (v = 0; v < V; v++) value[v] = CKCA__LOAD(b + v * CKCA__VW);
        CKCA__UNROLL for (i = 0; i < A; i++) {
            CKCA__V factor = CKCA__SET(a[i]);
            CKCA__UNROLL for (v = 0; v < V; v++) sum[i][v] = CKCA__FMA(factor, value[v], sum[i][v]);
        }
    }
    if (rows >= A && lanes >= V * CKCA__VW) {
        CKCA__UNROLL for (i = 0; i < A; i++, out += pitch) {
            CKCA__UNROLL for (v = 0; v < V; v++)
                CKCA__STORE(out + v * CKCA__VW, CKCA__ADD(CKCA__LOAD(out + v * CKCA__VW), sum[i][v]));
        }
    } else {
        float tile[3 * CKCA__TILE][CKCA__CHANNEL_BLOCK];
        CKCA__UNROLL for (i = 0; i < A; i++) {
            CKCA__UNROLL for (v = 0; v < V; v++) CKCA__STORE(tile[i] + v * CKCA__VW, sum[i][v]);
        }
        for (i = 0; i < A && i < rows; i++, out += pitch)
            for (v = 0; v < V * CKCA__VW && v < lanes; v++) out[v] += tile[i][v];
    }
}

#define CKCA__OUTER_TILE(T, V)                                                                                         \
    CKCA__NOINLINE void CKCA__NAME(ckca__outer_tile_##T##V)(int pixels, const float *a, const float *b, int rows,      \
                                                            int lanes, float *out, ptrdiff_t pitch, const float *next, \
                                                            ptrdiff_t step) {                                          \
        CKCA__NAME(ckca__outer_tile)(T * CKCA__TILE, V, pixels, a, b, rows, lanes, out, pitch, next, step);            \
    }
CKCA__OUTER_TILE(1, 1)
CKCA__OUTER_TILE(1, 2)
CKCA__OUTER_TILE(2, 1)
CKCA__OUTER_TILE(2, 2)
CKCA__OUTER_TILE(3, 1)
CKCA__OUTER_TILE(3, 2)
#undef CKCA__OUTER_TILE

/* Multiplies all panels of rows with all panels of lanes. */
static void CKCA__NAME(ckca__outer)(const ckca__outer *o) {
    static void (*const outer[3][2])(int, const float *, const float *, int, int, float *, ptrdiff_t, const float *,
                                     ptrdiff_t) = {{CKCA__NAME(ckca__outer_tile_11), CKCA__NAME(ckca__outer_tile_12)},
                                                   {CKCA__NAME(ckca__outer_tile_21), CKCA__NAME(ckca__outer_tile_22)},
                                                   {CKCA__NAME(ckca__outer_tile_31), CKCA__NAME(ckca__outer_tile_32)}};
    int panels = (o->rows + 3 * CKCA__TILE - 1) / (3 * CKCA__TILE), lines = (o->lanes + 15) / 16, tile = 0, left, size;
    int lanes = o->lanes;
    const float *a, *b = o->b;
    float *column = o->out, *out;
    for (; lanes > 0; lanes -= CKCA__CHANNEL_BLOCK, b += ckca__panel_pitch(CKCA__CHANNEL_BLOCK, o->pixels),
                      column += CKCA__CHANNEL_BLOCK) {
        int two = lanes > CKCA__VW;
        a = o->a;
        out = column;
        for (left = o->rows; left > 0; left -= size, out += size * o->pitch, tile++) {
            /* The first tiles prefetch one panel of rows each, the next ones one line of lanes each. */
            const float *next = a;
            ptrdiff_t step = 0;
            if (tile < panels && o->next_a) {
                next = o->next_a + tile * 3 * CKCA__TILE;
                step = o->step_a;
            } else if (tile >= panels && tile < panels + lines && o->next_b) {
                next = o->next_b + (tile - panels) * 16;
                step = o->step_b;
            }
            size = left > 2 * CKCA__TILE ? 3 : left > CKCA__TILE ? 2 : 1;
            outer[size - 1][two](o->pixels, a, b, left, lanes, out, o->pitch, next, step);
            size *= CKCA__TILE;
            a += ckca__panel_pitch(size, o->pixels);
        }
    }
}

/* One task: a group of pixels, a range of rows and a range of lanes. */
static void CKCA__NAME(ckca__conv_weight_task)(const ckca__wgrad_job *job, int task, float *scratch) {
    const ckca__conv *s = &job->s;
    int lane = task % job->lane_tasks * job->task_lanes, row = task / job->lane_tasks % job->row_tasks * job->task_rows;
    int g = task / job->lane_tasks / job->row_tasks, taps = job->swap ? 1 : s->r * s->s, i, t;
    ptrdiff_t all = (ptrdiff_t)s->n * s->p * s->q, per = (ptrdiff_t)s->r * s->s * s->c;
    ptrdiff_t first = all * g / job->groups, end = all * (g + 1) / job->groups;
    float *a = scratch, *b = scratch + job->at_b;
    float *zeros = scratch + job->at_zeros, *patches = scratch + job->at_patches;
    float *sums;
    ckca__outer o;
    o.rows = job->rows - row < job->task_rows ? job->rows - row : job->task_rows;
    o.lanes = job->lanes - lane < job->task_lanes ? job->lanes - lane : job->task_lanes;
    o.a = a;
    o.b = b;
    o.pitch = job->swap ? s->k : per;
    sums = job->sums + g * per * s->k + row * o.pitch + lane;
    memset(zeros, 0, sizeof *zeros * (size_t)o.lanes);
    if (job->partial)
        for (i = 0; i < o.rows; i++)
            for (t = 0; t < taps; t++) memset(sums + i * o.pitch + t * s->c, 0, sizeof *sums * (size_t)o.lanes);
    for (; first < end; first += o.pixels) {
        ptrdiff_t next;
        o.pixels = end - first < job->pixels ? (int)(end - first) : job->pixels;
        next = first + o.pixels;
        o.next_a = next < end && !job->swap ? job->dy + next * s->k + row : NULL;
        o.step_a = s->k;
        o.next_b = next >= end ? NULL
                   : job->swap ? job->dy + next * s->k + lane
                               : job->x + next * s->stride * s->stride * s->c + lane;
        o.step_b = job->swap ? s->k : s->stride * s->c;
        if (job->swap) {
            CKCA__NAME(ckca__conv_patches)(job, first, o.pixels, patches);
            CKCA__NAME(ckca__row_panels)(o.pixels, o.rows, patches + row, job->rows, a);
            CKCA__NAME(ckca__lane_panels)
            (o.pixels, 0, o.pixels, o.lanes, job->dy + first * s->k + lane, s->k, b);
        } else
            CKCA__NAME(ckca__row_panels)(o.pixels, o.rows, job->dy + first * s->k + row, s->k, a);
        for (t = 0; t < taps; t++) {
            if (!job->swap)
                CKCA__NAME(ckca__conv_lanes)(job, first, o.pixels, t / s->s, t % s->s, lane, o.lanes, zeros, b);
            o.out = sums + t * s->c;
            CKCA__NAME(ckca__outer)(&o);
            o.next_a = o.next_b = NULL; /* prefetched during the first tap */
        }
    }
}
/* ---- Winograd's algorithm for 3 x 3 kernels of stride 1 and 2 (Winograd 1980; Lavin and Gray 2016) ----

   Four outputs along an axis are 12 products of six pixels d with three weights g. Seen as polynomials, d and g are
   determined by their values at six points, and multiplying polynomials multiplies these values one by one:
   y = A^T ((G g) (B^T d)) needs 6 products, and on both axes, for a tile of 4 x 4 outputs, 36 instead of 144. With the
   points 0, a, -a, b, -b, infinity, where a^2 = 1/2 and b^2 = 2:

             1    0  -5/2    0   1   0           1     0      0
             0   -2a  -2     a   1   0         -2/3  -2a/3  -1/3          1   1   1    1    1   0
     B^T =   0    2a  -2    -a   1   0     G = -2/3   2a/3  -1/3    A^T = 0   a  -a    b   -b   0
             0  -b/2 -1/2    b   1   0          1/6   b/6    1/3          0  1/2 1/2   2    2   0
             0   b/2 -1/2   -b   1   0          1/6  -b/6    1/3          0  a/2 -a/2  2b  -2b  1
             0    1    0   -5/2  0   1           0     0      1

   (The usual points 0, 1, -1, 2, -2 double the rounding error, at worst six times as much.) The sum over channels is
   taken in the transform domain: 36 matrix products of tiles x C by C x K. The input gradient is the same with the
   weights rotated by 180 degrees and C and K exchanged. The weight gradient is the transpose, G^T ((A dy) (B^T d)),
   whose matrix products are reduced over tiles. The transforms of pixels and outputs take back part of the saving: they
   cost 270 vector operations per 36 values of a channel, so the fewer channels there are, the smaller the gain.

   With stride 2, output i is g0 d[2i] + g2 d[2i + 2], two weights on the even pixels, plus g1 d[2i + 1] on the odd
   ones. Of a tile's nine pixels the five even ones are evaluated at a, -a, b, -b and infinity, F(4, 2), and the four
   odd ones are used as they are: 9 products instead of 12, on both axes 81 instead of 144. The weights still have 36
   matrices, since all odd pixels are multiplied with the same g1. The input gradient makes tiles of 8 x 8 out of 5 x 5
   of dy: with padding 1 its even pixels are multiplied with g1, its odd ones with g0 and g2. Rounding errors are up to
   1.3 times (y) and 2.6 times (dx) those of direct sums.

   Each task handles some of the tiles, in blocks that stay in L2: transform the pixels, multiply at each point,
   transform the outputs, all in its own scratch. If tiles are few and weights many, tasks are ranges of output channels
   instead, each of which transforms its own weights; otherwise the weights are transformed once for all tasks. */

/* The transforms along one axis. */
#define CKCA__WINO_A 0.70710678f     /* a^2 = 1/2 */
#define CKCA__WINO_B 1.41421356f     /* b^2 = 2 */
#define CKCA__GROUP (3 * CKCA__TILE) /* tiles of a register tile */

/* Two weights, F(4, 2): five pixels at the points a, -a, b, -b and infinity. Used by both strides. */
CKCA__INLINE void CKCA__NAME(ckca__wino_pair_source)(const CKCA__V *d, CKCA__V *u) {
    CKCA__V even_a = CKCA__FMA(CKCA__SET(-2.0f), d[1], d[3]), odd_a = CKCA__FMA(CKCA__SET(-2.0f), d[0], d[2]);
    CKCA__V even_b = CKCA__FMA(CKCA__SET(-0.5f), d[1], d[3]), odd_b = CKCA__FMA(CKCA__SET(-0.5f), d[0], d[2]);
    u[0] = CKCA__FMA(CKCA__SET(CKCA__WINO_A), odd_a, even_a);
    u[1] = CKCA__FMA(CKCA__SET(-CKCA__WINO_A), odd_a, even_a);
    u[2] = CKCA__FMA(CKCA__SET(CKCA__WINO_B), odd_b, even_b);
    u[3] = CKCA__FMA(CKCA__SET(-CKCA__WINO_B), odd_b, even_b);
    u[4] = CKCA__ADD(d[0], CKCA__FMA(CKCA__SET(-2.5f), d[2], d[4]));
}

/* u = B^T d: six pixels to six points. */
CKCA__INLINE void CKCA__NAME(ckca__wino_source)(const CKCA__V *d, CKCA__V *u) {
    u[0] = CKCA__ADD(d[0], CKCA__FMA(CKCA__SET(-2.5f), d[2], d[4]));
    CKCA__NAME(ckca__wino_pair_source)(d + 1, u + 1);
}

/* u = G g: three weights to six points. */
CKCA__INLINE void CKCA__NAME(ckca__wino_weight)(const CKCA__V *g, CKCA__V *u) {
    CKCA__V even_a = CKCA__MUL(CKCA__SET(-2.0f / 3), CKCA__FMA(CKCA__SET(0.5f), g[2], g[0]));
    CKCA__V even_b = CKCA__MUL(CKCA__SET(1.0f / 6), CKCA__FMA(CKCA__SET(2.0f), g[2], g[0]));
    u[0] = g[0];
    u[1] = CKCA__FMA(CKCA__SET(-2 * CKCA__WINO_A / 3), g[1], even_a);
    u[2] = CKCA__FMA(CKCA__SET(2 * CKCA__WINO_A / 3), g[1], even_a);
    u[3] = CKCA__FMA(CKCA__SET(CKCA__WINO_B / 6), g[1], even_b);
    u[4] = CKCA__FMA(CKCA__SET(-CKCA__WINO_B / 6), g[1], even_b);
    u[5] = g[2];
}

/* Stride 2: the outer two of three weights at five points, then the middle one as it is. */
CKCA__INLINE void CKCA__NAME(ckca__wino_pair_weight)(const CKCA__V *g, CKCA__V *u) {
    CKCA__V low = CKCA__MUL(CKCA__SET(1.0f / 3), g[2]);
    u[0] = CKCA__SUB(CKCA__MUL(CKCA__SET(-2 * CKCA__WINO_A / 3), g[0]), low);
    u[1] = CKCA__SUB(CKCA__MUL(CKCA__SET(2 * CKCA__WINO_A / 3), g[0]), low);
    u[2] = CKCA__FMA(CKCA__SET(CKCA__WINO_B / 6), g[0], low);
    u[3] = CKCA__FMA(CKCA__SET(-CKCA__WINO_B / 6), g[0], low);
    u[4] = g[2];
    u[5] = g[1];
}

/* y = A^T m: from the points to four outputs. */
CKCA__INLINE void CKCA__NAME(ckca__wino_pair_output)(const CKCA__V *m, CKCA__V *y) {
    CKCA__V sum_a = CKCA__ADD(m[0], m[1]), dif_a = CKCA__MUL(CKCA__SET(CKCA__WINO_A), CKCA__SUB(m[0], m[1]));
    CKCA__V sum_b = CKCA__ADD(m[2], m[3]), dif_b = CKCA__MUL(CKCA__SET(CKCA__WINO_B), CKCA__SUB(m[2], m[3]));
    y[0] = CKCA__ADD(sum_a, sum_b);
    y[1] = CKCA__ADD(dif_a, dif_b);
    y[2] = CKCA__FMA(CKCA__SET(2.0f), sum_b, CKCA__MUL(CKCA__SET(0.5f), sum_a));
    y[3] = CKCA__FMA(CKCA__SET(2.0f), dif_b, CKCA__FMA(CKCA__SET(0.5f), dif_a, m[4]));
}
CKCA__INLINE void CKCA__NAME(ckca__wino_output)(const CKCA__V *m, CKCA__V *y) {
    CKCA__NAME(ckca__wino_pair_output)(m + 1, y);
    y[0] = CKCA__ADD(m[0], y[0]);
}

/* m = A y: the transpose, for gradients. */
CKCA__INLINE void CKCA__NAME(ckca__wino_pair_output_transposed)(const CKCA__V *y, CKCA__V *m) {
    CKCA__V even_a = CKCA__FMA(CKCA__SET(0.5f), y[2], y[0]), odd_a = CKCA__FMA(CKCA__SET(0.5f), y[3], y[1]);
    CKCA__V even_b = CKCA__FMA(CKCA__SET(2.0f), y[2], y[0]), odd_b = CKCA__FMA(CKCA__SET(2.0f), y[3], y[1]);
    m[0] = CKCA__FMA(CKCA__SET(CKCA__WINO_A), odd_a, even_a);
    m[1] = CKCA__FMA(CKCA__SET(-CKCA__WINO_A), odd_a, even_a);
    m[2] = CKCA__FMA(CKCA__SET(CKCA__WINO_B), odd_b, even_b);
    m[3] = CKCA__FMA(CKCA__SET(-CKCA__WINO_B), odd_b, even_b);
    m[4] = y[3];
}
CKCA__INLINE void CKCA__NAME(ckca__wino_output_transposed)(const CKCA__V *y, CKCA__V *m) {
    m[0] = y[0];
    CKCA__NAME(ckca__wino_pair_output_transposed)(y, m + 1);
}

/* g = G^T u: the transpose, for the gradient of three weights. */
CKCA__INLINE void CKCA__NAME(ckca__wino_weight_transposed)(const CKCA__V *u, CKCA__V *g) {
    CKCA__V sum_a = CKCA__MUL(CKCA__SET(-2.0f / 3), CKCA__ADD(u[1], u[2]));
    CKCA__V sum_b = CKCA__MUL(CKCA__SET(1.0f / 6), CKCA__ADD(u[3], u[4]));
    g[0] = CKCA__ADD(u[0], CKCA__ADD(sum_a, sum_b));
    g[1] = CKCA__FMA(CKCA__SET(-2 * CKCA__WINO_A / 3), CKCA__SUB(u[1], u[2]),
                     CKCA__MUL(CKCA__SET(CKCA__WINO_B / 6), CKCA__SUB(u[3], u[4])));
    g[2] = CKCA__ADD(CKCA__FMA(CKCA__SET(0.5f), sum_a, u[5]), CKCA__MUL(CKCA__SET(2.0f), sum_b));
}
CKCA__INLINE void CKCA__NAME(ckca__wino_pair_weight_transposed)(const CKCA__V *u, CKCA__V *g) {
    CKCA__V sum = CKCA__SUB(CKCA__ADD(u[2], u[3]), CKCA__ADD(u[0], u[1]));
    g[0] = CKCA__FMA(CKCA__SET(-2 * CKCA__WINO_A / 3), CKCA__SUB(u[0], u[1]),
                     CKCA__MUL(CKCA__SET(CKCA__WINO_B / 6), CKCA__SUB(u[2], u[3])));
    g[1] = u[5];
    g[2] = CKCA__FMA(CKCA__SET(1.0f / 3), sum, u[4]);
}

/* The transform of pixels along one axis, by kind. */
CKCA__INLINE void CKCA__NAME(ckca__wino_transform)(const int kind, const CKCA__V *d, CKCA__V *u) {
    int i;
    if (kind == CKCA__WINO_KIND_SOURCE)
        CKCA__NAME(ckca__wino_source)(d, u);
    else if (kind == CKCA__WINO_KIND_DY)
        CKCA__NAME(ckca__wino_output_transposed)(d, u);
    else if (kind == CKCA__WINO_KIND_SOURCE_2) {
        CKCA__V e[5];
        CKCA__UNROLL for (i = 0; i < 5; i++) e[i] = d[2 * i];
        CKCA__NAME(ckca__wino_pair_source)(e, u);
        CKCA__UNROLL for (i = 0; i < 4; i++) u[5 + i] = d[2 * i + 1];
    } else {
        if (kind == CKCA__WINO_KIND_DY_2)
            CKCA__NAME(ckca__wino_pair_output_transposed)(d, u);
        else
            CKCA__NAME(ckca__wino_pair_source)(d, u);
        CKCA__UNROLL for (i = 0; i < 4; i++) u[5 + i] = d[i];
    }
}

/* The transform of sums to outputs along one axis, by kind. */
CKCA__INLINE void CKCA__NAME(ckca__wino_inverse)(const int kind, const CKCA__V *m, CKCA__V *y) {
    int i;
    if (kind == CKCA__WINO_KIND_SOURCE)
        CKCA__NAME(ckca__wino_output)(m, y);
    else {
        CKCA__V outer[4];
        CKCA__NAME(ckca__wino_pair_output)(m, outer);
        CKCA__UNROLL for (i = 0; i < 4; i++) {
            if (kind == CKCA__WINO_KIND_SOURCE_2)
                y[i] = CKCA__ADD(outer[i], m[5 + i]);
            else {
                y[2 * i] = m[5 + i];
                y[2 * i + 1] = outer[i];
            }
        }
    }
}

/* Transforms tiles [first, first + count) of a range of channels, reading zeros outside the maps. group is CKCA__GROUP,
   or job->block for a single group. */
CKCA__INLINE void CKCA__NAME(ckca__wino_gather)(const int kind, const ckca__wino_job *job, const ckca__wino_maps *maps,
                                                int first, int count, int group, const float *zeros, float *to) {
    const int size = kind == CKCA__WINO_KIND_SOURCE     ? 6
                     : kind == CKCA__WINO_KIND_SOURCE_2 ? 9
                     : kind == CKCA__WINO_KIND_DX_2     ? 5
                                                        : 4; /* pixels of a tile along an axis */
    const int axis = kind == CKCA__WINO_KIND_SOURCE || kind == CKCA__WINO_KIND_DY ? 6 : 9;
    ptrdiff_t pitch = ckca__wino_pitch(job->block, maps->channels);
    ptrdiff_t step = (ptrdiff_t)CKCA__GROUP * (group == CKCA__GROUP ? maps->channels : CKCA__VW);
    const float *pixel[CKCA__GROUP][9 * 9];
    int t, i, j, k;
    for (; count > 0; count -= CKCA__GROUP, first += CKCA__GROUP, to += step) {
        int tiles = count < CKCA__GROUP ? count : CKCA__GROUP;
        for (t = 0; t < tiles; t++) {
            int tile = first + t, picture = tile / (job->across * job->down), rest = tile % (job->across * job->down);
            int y = rest / job->across * maps->step - maps->pad, x = rest % job->across * maps->step - maps->pad;
            for (i = 0; i < size; i++)
                for (j = 0; j < size; j++) {
                    ptrdiff_t at = (((ptrdiff_t)picture * maps->h + y + i) * maps->w + x + j) * maps->c;
                    int inside = ((unsigned)(y + i) < (unsigned)maps->h) & ((unsigned)(x + j) < (unsigned)maps->w);
                    pixel[t][i * size + j] = inside ? maps->at + at : zeros;
                }
        }
        for (t = 0; t < tiles; t++)
            for (k = 0; k < maps->channels; k += CKCA__VW) {
                const float *const *current = pixel[t], *const *next = pixel[t + 1 < tiles ? t + 1 : t];
                float *at = to + (ptrdiff_t)k * group + t * CKCA__VW;
                CKCA__V d[9], u[9], partial[9][9];
                CKCA__ROLL for (j = 0; j < size; j++) {
                    CKCA__UNROLL for (i = 0; i < size; i++) {
                        d[i] = CKCA__LOAD(current[i * size + j] + k);
                        if (maps->norm && current[i * size + j] != zeros)
                            d[i] = CKCA__NAME(ckca__norm)(maps->norm, k, d[i]);
                        __builtin_prefetch(next[i * size + j] + k);
                    }
                    CKCA__NAME(ckca__wino_transform)(kind, d, u);
                    CKCA__UNROLL for (i = 0; i < axis; i++) partial[i][j] = u[i];
                }
                CKCA__ROLL for (i = 0; i < axis; i++) {
                    CKCA__NAME(ckca__wino_transform)(kind, partial[i], u);
                    CKCA__UNROLL for (j = 0; j < axis; j++) CKCA__STORE(at + (i * axis + j) * pitch, u[j]);
                }
            }
    }
}

static int CKCA__NAME(ckca__wino_channels)(const ckca__wino_job *job, int block) { /* of a block of output channels */
    return job->k - block * CKCA__CHANNEL_BLOCK < CKCA__CHANNEL_BLOCK ? CKCA__VW : CKCA__CHANNEL_BLOCK;
}

/* Transforms the weights of a block of output channels: [point][c][channels]. */
static void CKCA__NAME(ckca__wino_pack)(const ckca__wino_job *job, int block, float *to) {
    ptrdiff_t in_step = job->rotated180 ? (ptrdiff_t)9 * job->k : 1,
              out_step = job->rotated180 ? 1 : (ptrdiff_t)9 * job->c;
    ptrdiff_t tap_step = job->rotated180 ? job->k : job->c;
    int first = block * CKCA__CHANNEL_BLOCK, channels = CKCA__NAME(ckca__wino_channels)(job, block);
    float taps[9][16][CKCA__CHANNEL_BLOCK];
    int c, i, k, t;
    for (c = 0; c < job->c; c += 16) {
        for (t = 0; t < 9; t++) { /* the input gradient's taps are rotated by 180 degrees */
            const float *from =
                job->weights + first * out_step + c * in_step + (job->rotated180 ? 8 - t : t) * tap_step;
            if (job->rotated180)
                for (i = 0; i < 16; i++) {
                    __builtin_prefetch(from + (i + 16) * in_step);
                    __builtin_prefetch(from + (i + 16) * in_step + 16);
                    memcpy(taps[t][i], from + i * in_step, sizeof(float) * (size_t)channels);
                }
            else
                for (k = 0; k < channels; k++) {
                    __builtin_prefetch(from + k * out_step + 16);
                    for (i = 0; i < 16; i++) taps[t][i][k] = from[k * out_step + i];
                }
        }
        for (i = 0; i < 16; i++)
            for (k = 0; k < channels; k += CKCA__VW) {
                CKCA__V g[3], u[6], partial[6][3];
                int a, b;
                CKCA__ROLL for (b = 0; b < 3; b++) {
                    CKCA__UNROLL for (a = 0; a < 3; a++) g[a] = CKCA__LOAD(taps[a * 3 + b][i] + k);
                    if (job->stride == 2)
                        CKCA__NAME(ckca__wino_pair_weight)(g, u);
                    else
                        CKCA__NAME(ckca__wino_weight)(g, u);
                    CKCA__UNROLL for (a = 0; a < 6; a++) partial[a][b] = u[a];
                }
                CKCA__ROLL for (a = 0; a < 6; a++) {
                    if (job->stride == 2)
                        CKCA__NAME(ckca__wino_pair_weight)(partial[a], u);
                    else
                        CKCA__NAME(ckca__wino_weight)(partial[a], u);
                    CKCA__UNROLL for (b = 0; b < 6; b++)
                        CKCA__STORE(to + ((ptrdiff_t)(a * 6 + b) * job->c + c + i) * channels + k, u[b]);
                }
            }
    }
}

/* to (P tiles x V vectors) = the sum over channels of x[tile][c] w[c][V vectors], for P tiles of a group. */
CKCA__INLINE void CKCA__NAME(ckca__wino_product)(const int P, const int V, int c, const float *x, const float *w,
                                                 float *to) {
    CKCA__V sum[CKCA__GROUP][2];
    int p, v, j;
    CKCA__UNROLL for (p = 0; p < P; p++) { CKCA__UNROLL for (v = 0; v < V; v++) sum[p][v] = CKCA__SET(0.0f); }
    for (; c > 0; c -= CKCA__VW, x += (CKCA__GROUP - 1) * CKCA__VW)
        for (j = 0; j < CKCA__VW; j++, x++, w += V * CKCA__VW) {
            CKCA__V weight[2];
            CKCA__UNROLL for (v = 0; v < V; v++) weight[v] = CKCA__LOAD(w + v * CKCA__VW);
            CKCA__UNROLL for (p = 0; p < P; p++) {
                CKCA__V value = CKCA__SET(x[p * CKCA__VW]);
                CKCA__UNROLL for (v = 0; v < V; v++) sum[p][v] = CKCA__FMA(value, weight[v], sum[p][v]);
            }
        }
    CKCA__UNROLL for (p = 0; p < P; p++) {
        CKCA__UNROLL for (v = 0; v < V; v++) CKCA__STORE(to + (p * V + v) * CKCA__VW, sum[p][v]);
    }
}

/* The product of all tiles of a block at one point. */
static void CKCA__NAME(ckca__wino_products)(int count, int two, int c, const float *x, const float *w, float *to) {
    int size = two ? CKCA__CHANNEL_BLOCK : CKCA__VW;
    for (; count > 0; count -= CKCA__GROUP, x += CKCA__GROUP * c, to += CKCA__GROUP * size) {
        if (count > 2 * CKCA__TILE && two)
            CKCA__NAME(ckca__wino_product)(CKCA__GROUP, 2, c, x, w, to);
        else if (count > 2 * CKCA__TILE)
            CKCA__NAME(ckca__wino_product)(CKCA__GROUP, 1, c, x, w, to);
        else if (count > CKCA__TILE && two)
            CKCA__NAME(ckca__wino_product)(2 * CKCA__TILE, 2, c, x, w, to);
        else if (count > CKCA__TILE)
            CKCA__NAME(ckca__wino_product)(2 * CKCA__TILE, 1, c, x, w, to);
        else if (two)
            CKCA__NAME(ckca__wino_product)(CKCA__TILE, 2, c, x, w, to);
        else
            CKCA__NAME(ckca__wino_product)(CKCA__TILE, 1, c, x, w, to);
    }
}

/* Transforms sums, [point][tile of the block][channels], to outputs. Epilogue: bias, residual, ReLU. */
CKCA__INLINE void CKCA__NAME(ckca__wino_scatter)(const int kind, const ckca__wino_job *job, int k0, int channels,
                                                 int first, int count, const float *from) {
    const int axis = kind == CKCA__WINO_KIND_SOURCE ? 6 : 9, outputs = kind == CKCA__WINO_KIND_DX_2 ? 8 : 4;
    ptrdiff_t pitch = ckca__wino_pitch(job->block, channels);
    int t, k, i, j;
    for (t = 0; t < count; t++) {
        int tile = first + t, picture = tile / (job->across * job->down), rest = tile % (job->across * job->down);
        int top = rest / job->across * outputs, left = rest % job->across * outputs;
        int rows = job->oh - top < outputs ? job->oh - top : outputs;
        int cols = job->ow - left < outputs ? job->ow - left : outputs;
        ptrdiff_t at = (((ptrdiff_t)picture * job->oh + top) * job->ow + left) * job->k + k0;
        for (k = 0; k < channels; k += CKCA__VW, at += CKCA__VW) {
            CKCA__V m[9], y[8], partial[8][9], bias = job->bias ? CKCA__LOAD(job->bias + k0 + k) : CKCA__SET(0.0f);
            CKCA__ROLL for (j = 0; j < axis; j++) {
                CKCA__UNROLL for (i = 0; i < axis; i++) m[i] =
                    CKCA__LOAD(from + (i * axis + j) * pitch + (ptrdiff_t)t * channels + k);
                CKCA__NAME(ckca__wino_inverse)(kind, m, y);
                CKCA__UNROLL for (i = 0; i < outputs; i++) partial[i][j] = y[i];
            }
            CKCA__ROLL for (i = 0; i < rows; i++) {
                ptrdiff_t to = at + (ptrdiff_t)i * job->ow * job->k;
                CKCA__NAME(ckca__wino_inverse)(kind, partial[i], y);
                CKCA__UNROLL for (j = 0; j < outputs; j++) {
                    if (j < cols) {
                        CKCA__V sum = CKCA__ADD(y[j], bias);
                        if (job->residual) sum = CKCA__ADD(sum, CKCA__LOAD(job->residual + to));
                        if (job->relu) sum = CKCA__MAX(CKCA__SET(0.0f), sum); /* in this order NaN passes through */
                        CKCA__STORE(job->output + to, sum);
                        to += job->k;
                    }
                }
            }
        }
    }
}

/* One task of the forward pass or the input gradient. */
static void CKCA__NAME(ckca__wino_task)(const ckca__wino_job *job, int task, float *scratch) {
    int part = task / job->ranges, range = task % job->ranges, tile, b, i;
    int blocks = (job->k + CKCA__CHANNEL_BLOCK - 1) / CKCA__CHANNEL_BLOCK;
    int begin = (int)((long long)job->tiles * part / job->parts);
    int end = (int)((long long)job->tiles * (part + 1) / job->parts);
    int from = blocks * range / job->ranges, to = blocks * (range + 1) / job->ranges;
    float *zeros = scratch, *pixels = zeros + job->c;
    float *sums = pixels + job->elements * ckca__wino_pitch(job->block, job->c);
    float *own = sums + job->elements * ckca__wino_pitch(job->block, CKCA__CHANNEL_BLOCK);
    ptrdiff_t per = (ptrdiff_t)CKCA__WINO_ELEMENTS * job->c * CKCA__CHANNEL_BLOCK;
    const float *weights = job->packed ? job->packed + from * per : own;
    memset(zeros, 0, sizeof *zeros * (size_t)job->c);
    if (!job->packed)
        for (b = from; b < to; b++) CKCA__NAME(ckca__wino_pack)(job, b, own + (b - from) * per);
    for (tile = begin; tile < end; tile += job->block) {
        int count = end - tile < job->block ? end - tile : job->block;
#define CKCA__WINO_GATHER(kind) \
    CKCA__NAME(ckca__wino_gather)(kind, job, &job->source, tile, count, CKCA__GROUP, zeros, pixels)
        if (job->stride == 1)
            CKCA__WINO_GATHER(CKCA__WINO_KIND_SOURCE);
        else if (job->rotated180)
            CKCA__WINO_GATHER(CKCA__WINO_KIND_DX_2);
        else
            CKCA__WINO_GATHER(CKCA__WINO_KIND_SOURCE_2);
#undef CKCA__WINO_GATHER
        for (b = from; b < to; b++) {
            int channels = CKCA__NAME(ckca__wino_channels)(job, b);
            for (i = 0; i < job->elements; i++) {
                CKCA__NAME(ckca__wino_products)
                (count, channels > CKCA__VW, job->c, pixels + i * ckca__wino_pitch(job->block, job->c),
                 weights + (b - from) * per + (ptrdiff_t)ckca__wino_weight_index(job, i) * job->c * channels,
                 sums + i * ckca__wino_pitch(job->block, channels));
            }
#define CKCA__WINO_SCATTER(kind) \
    CKCA__NAME(ckca__wino_scatter)(kind, job, b * CKCA__CHANNEL_BLOCK, channels, tile, count, sums)
            if (job->stride == 1)
                CKCA__WINO_SCATTER(CKCA__WINO_KIND_SOURCE);
            else if (job->rotated180)
                CKCA__WINO_SCATTER(CKCA__WINO_KIND_DX_2);
            else
                CKCA__WINO_SCATTER(CKCA__WINO_KIND_SOURCE_2);
#undef CKCA__WINO_SCATTER
        }
    }
}

/* to[2 CKCA__TILE rows of k][V vectors of c] += the sum over a block's tiles of dy[tile][k] x[tile][c], at one point.
   first: to is overwritten. */
CKCA__INLINE void CKCA__NAME(ckca__wino_outer)(const int V, int c, int block, int count, int first, const float *dy,
                                               const float *x, float *to) {
    ptrdiff_t vector = (ptrdiff_t)block * CKCA__VW; /* floats from one vector's tiles to the next's */
    CKCA__V sum[2 * CKCA__TILE][2];
    int i, v;
    CKCA__UNROLL for (i = 0; i < 2 * CKCA__TILE; i++) {
        CKCA__UNROLL for (v = 0; v < V; v++) {
            __builtin_prefetch(to + i * c + v * CKCA__VW, 1);
            sum[i][v] = CKCA__SET(0.0f);
        }
    }
    for (; count > 0; count--, dy += CKCA__VW, x += CKCA__VW) {
        CKCA__V value[2];
        CKCA__UNROLL for (v = 0; v < V; v++) value[v] = CKCA__LOAD(x + v * vector);
        CKCA__UNROLL for (i = 0; i < 2 * CKCA__TILE; i++) { /* rows may continue in dy's next vector */
            CKCA__V factor = CKCA__SET(dy[i / CKCA__VW * vector + i % CKCA__VW]);
            CKCA__UNROLL for (v = 0; v < V; v++) sum[i][v] = CKCA__FMA(factor, value[v], sum[i][v]);
        }
    }
    CKCA__UNROLL for (i = 0; i < 2 * CKCA__TILE; i++, to += c) {
        CKCA__UNROLL for (v = 0; v < V; v++)
            CKCA__STORE(to + v * CKCA__VW, first ? sum[i][v] : CKCA__ADD(CKCA__LOAD(to + v * CKCA__VW), sum[i][v]));
    }
}

/* One task of the weight gradient: the contribution of its tiles to dw of a range of output channels. */
static void CKCA__NAME(ckca__wino_weight_task)(const ckca__wino_job *job, int task, float *scratch) {
    int part = task / job->ranges, range = task % job->ranges, tile, i, j, k, c;
    int begin = (int)((long long)job->tiles * part / job->parts);
    int end = (int)((long long)job->tiles * (part + 1) / job->parts);
    int k0 = job->k / 16 * range / job->ranges * 16, channels = job->k / 16 * (range + 1) / job->ranges * 16 - k0;
    ptrdiff_t c_pitch = ckca__wino_pitch(job->block, job->c), k_pitch = ckca__wino_pitch(job->block, channels);
    float *zeros = scratch, *x = zeros + (job->c > job->k ? job->c : job->k);
    float *dy = x + job->elements * c_pitch, *sums = dy + job->elements * k_pitch;
    ckca__wino_maps range_dy = job->dy;
    range_dy.at += k0;
    range_dy.channels = channels;
    memset(zeros, 0, sizeof *zeros * (size_t)(x - zeros));
    for (tile = begin; tile < end; tile += job->block) {
        int count = end - tile < job->block ? end - tile : job->block;
        if (job->stride == 1) {
            CKCA__NAME(ckca__wino_gather)(CKCA__WINO_KIND_SOURCE, job, &job->source, tile, count, job->block, zeros, x);
            CKCA__NAME(ckca__wino_gather)(CKCA__WINO_KIND_DY, job, &range_dy, tile, count, job->block, zeros, dy);
        } else {
            CKCA__NAME(ckca__wino_gather)
            (CKCA__WINO_KIND_SOURCE_2, job, &job->source, tile, count, job->block, zeros, x);
            CKCA__NAME(ckca__wino_gather)(CKCA__WINO_KIND_DY_2, job, &range_dy, tile, count, job->block, zeros, dy);
        }
        for (i = 0; i < job->elements; i++) {
            int at = ckca__wino_weight_index(job, i), first = tile == begin && i / job->axis < 6 && i % job->axis < 6;
            for (c = 0; c < job->c; c += CKCA__CHANNEL_BLOCK)
                for (k = 0; k < channels; k += 2 * CKCA__TILE) {
                    const float *a =
                        dy + i * k_pitch + (ptrdiff_t)(k / CKCA__VW) * job->block * CKCA__VW + k % CKCA__VW;
                    const float *b = x + i * c_pitch + (ptrdiff_t)c * job->block;
                    float *to = sums + ((ptrdiff_t)at * channels + k) * job->c + c;
                    if (job->c - c > CKCA__VW)
                        CKCA__NAME(ckca__wino_outer)(2, job->c, job->block, count, first, a, b, to);
                    else
                        CKCA__NAME(ckca__wino_outer)(1, job->c, job->block, count, first, a, b, to);
                }
        }
    }
    for (k = 0; k < channels; k++)
        for (c = 0; c < job->c; c += CKCA__VW) {
            CKCA__V u[6], g[3], partial[3][6];
            float *to = job->sums + (((ptrdiff_t)part * job->k + k0 + k) * 9) * job->c + c;
            CKCA__ROLL for (j = 0; j < 6; j++) {
                CKCA__UNROLL for (i = 0; i < 6; i++) u[i] =
                    CKCA__LOAD(sums + ((ptrdiff_t)(i * 6 + j) * channels + k) * job->c + c);
                if (job->stride == 2)
                    CKCA__NAME(ckca__wino_pair_weight_transposed)(u, g);
                else
                    CKCA__NAME(ckca__wino_weight_transposed)(u, g);
                CKCA__UNROLL for (i = 0; i < 3; i++) partial[i][j] = g[i];
            }
            CKCA__ROLL for (i = 0; i < 3; i++) {
                if (job->stride == 2)
                    CKCA__NAME(ckca__wino_pair_weight_transposed)(partial[i], g);
                else
                    CKCA__NAME(ckca__wino_weight_transposed)(partial[i], g);
                CKCA__UNROLL for (j = 0; j < 3; j++, to += job->c)
                    CKCA__STORE(to, job->parts > 1 ? g[j] : CKCA__ADD(CKCA__LOAD(to), g[j]));
            }
        }
}
#undef CKCA__GROUP

#undef CKCA__TILE
#undef CKCA__CHANNEL_BLOCK

/* ---- all other ops ----

   Channels are innermost, so a map is one long array in which channels repeat every c values, and also every cols
   values if cols is a multiple of c. Batch norm's kernels process count values in rows of cols, a multiple of c that
   fills whole vectors (ckca__fused_rows); the last row may be incomplete. */

/* sum[j] += d, square[j] += d^2 with d = x - shift[j], over some rows. The sums are too many for registers, so up to
   four rows are summed per visit to them. Long rows are taken one by one, since memory is fastest when read
   sequentially. */
static inline void CKCA__NAME(ckca__moments_rows)(int rows, size_t cols, const float *x, const float *shift, float *sum,
                                                  float *square) {
    size_t j = 0;
    int r;
    for (; j + CKCA__VW <= cols; j += CKCA__VW) {
        CKCA__V m = CKCA__LOAD(shift + j), s = CKCA__LOAD(sum + j), q = CKCA__LOAD(square + j);
        for (r = 0; r < rows; r++) {
            CKCA__V d = CKCA__SUB(CKCA__LOAD(x + (size_t)r * cols + j), m);
            s = CKCA__ADD(s, d);
            q = CKCA__FMA(d, d, q);
        }
        CKCA__STORE(sum + j, s);
        CKCA__STORE(square + j, q);
    }
    for (; j < cols; j++)
        for (r = 0; r < rows; r++) {
            float d = x[(size_t)r * cols + j] - shift[j];
            sum[j] += d;
            square[j] += d * d;
        }
}

static void CKCA__NAME(ckca__moments)(size_t count, size_t cols, const float *x, const float *shift, float *sum,
                                      float *square) {
    size_t i = 0;
    for (; cols < 256 && i + 4 * cols <= count; i += 4 * cols)
        CKCA__NAME(ckca__moments_rows)(4, cols, x + i, shift, sum, square);
    for (; i < count; i += cols)
        CKCA__NAME(ckca__moments_rows)(1, count - i < cols ? count - i : cols, x + i, shift, sum, square);
}

/* g where the ReLU passed x, else 0: where y > 0 or, if y is NULL, (x - mean) scale + beta > 0; everywhere if scale is
   NULL too. d is x - mean. */
CKCA__INLINE CKCA__V CKCA__NAME(ckca__gate)(CKCA__V g, CKCA__V d, const float *y, const float *scale,
                                            const float *beta) {
    if (y) return CKCA__WHERE_POSITIVE(CKCA__LOAD(y), g);
    return scale ? CKCA__WHERE_POSITIVE(CKCA__FMA(d, CKCA__LOAD(scale), CKCA__LOAD(beta)), g) : g;
}
CKCA__INLINE float CKCA__NAME(ckca__gate_one)(float g, float d, const float *y, const float *scale, const float *beta) {
    return (y ? *y : scale ? d * *scale + *beta : 1.0f) > 0 ? g : 0;
}

/* sum[j] += g, product[j] += g (x - mean[j]), with g = dy where the gate is open. */
static inline void CKCA__NAME(ckca__products_rows)(int rows, size_t cols, const float *x, const float *y,
                                                   const float *dy, const float *mean, const float *scale,
                                                   const float *beta, float *sum, float *product) {
    size_t j = 0, i;
    int r;
    for (; j + CKCA__VW <= cols; j += CKCA__VW) {
        CKCA__V m = CKCA__LOAD(mean + j), s = CKCA__LOAD(sum + j), p = CKCA__LOAD(product + j);
        for (r = 0, i = j; r < rows; r++, i += cols) {
            CKCA__V d = CKCA__SUB(CKCA__LOAD(x + i), m);
            CKCA__V g = CKCA__NAME(ckca__gate)(CKCA__LOAD(dy + i), d, y ? y + i : NULL, scale ? scale + j : NULL,
                                               scale ? beta + j : NULL);
            s = CKCA__ADD(s, g);
            p = CKCA__FMA(g, d, p);
        }
        CKCA__STORE(sum + j, s);
        CKCA__STORE(product + j, p);
    }
    for (; j < cols; j++)
        for (r = 0, i = j; r < rows; r++, i += cols) {
            float d = x[i] - mean[j];
            float g = CKCA__NAME(ckca__gate_one)(dy[i], d, y ? y + i : NULL, scale ? scale + j : NULL,
                                                 scale ? beta + j : NULL);
            sum[j] += g;
            product[j] += g * d;
        }
}

static void CKCA__NAME(ckca__products)(size_t count, size_t cols, const float *x, const float *y, const float *dy,
                                       const float *mean, const float *scale, const float *beta, float *sum,
                                       float *product) {
    size_t i = 0;
    for (; cols < 128 && i + 4 * cols <= count; i += 4 * cols)
        CKCA__NAME(ckca__products_rows)(4, cols, x + i, y ? y + i : NULL, dy + i, mean, scale, beta, sum, product);
    for (; i < count; i += cols) {
        CKCA__NAME(ckca__products_rows)
        (1, count - i < cols ? count - i : cols, x + i, y ? y + i : NULL, dy + i, mean, scale, beta, sum, product);
    }
}

/* (x - mean) scale + beta, of a vector and of a single value. */
CKCA__INLINE CKCA__V CKCA__NAME(ckca__scaled)(const ckca__norm_table *t, size_t j, const float *x) {
    return CKCA__FMA(CKCA__SUB(CKCA__LOAD(x), CKCA__LOAD(t->mean + j)), CKCA__LOAD(t->scale + j),
                     CKCA__LOAD(t->beta + j));
}
CKCA__INLINE float CKCA__NAME(ckca__scaled_one)(const ckca__norm_table *t, size_t j, float x) {
    return (x - t->mean[j]) * t->scale[j] + t->beta[j];
}

/* y = relu?((x - mean) scale + beta + residual). residual and residual_table may be NULL. */
static void CKCA__NAME(ckca__normalize)(size_t count, size_t cols, const float *x, const ckca__norm_table *table,
                                        const float *residual, const ckca__norm_table *residual_table, float *y) {
    const CKCA__V zero = CKCA__SET(0);
    const ckca__norm_table t = *table, r = residual_table ? *residual_table : t;
    const int normed = residual_table != NULL;
    size_t i, j, end;
    for (i = 0; i < count; i += cols) {
        end = count - i < cols ? count - i : cols;
        for (j = 0; j + CKCA__VW <= end; j += CKCA__VW) {
            CKCA__V v = CKCA__NAME(ckca__scaled)(&t, j, x + i + j);
            if (residual) {
                CKCA__V add = normed ? CKCA__NAME(ckca__scaled)(&r, j, residual + i + j) : CKCA__LOAD(residual + i + j);
                if (normed && r.relu) add = CKCA__MAX(zero, add);
                v = CKCA__ADD(v, add);
            }
            if (t.relu) v = CKCA__MAX(zero, v); /* in this order NaN passes through */
            CKCA__STORE(y + i + j, v);
        }
        for (; j < end; j++) {
            float v = CKCA__NAME(ckca__scaled_one)(&t, j, x[i + j]), add = residual ? residual[i + j] : 0;
            if (normed) {
                add = CKCA__NAME(ckca__scaled_one)(&r, j, add);
                if (r.relu && add <= 0) add = 0;
            }
            if (residual) v += add;
            y[i + j] = t.relu && v <= 0 ? 0 : v;
        }
    }
}

/* dx = scale g - b (x - mean) - c; dresidual (+)= g. beta NULL: the gate does not depend on x. */
static void CKCA__NAME(ckca__normalize_backward)(size_t count, size_t cols, const float *x, const float *y,
                                                 const float *dy, const float *mean, const float *scale, const float *b,
                                                 const float *c, const float *beta, float *dx, float *dresidual,
                                                 int accumulate) {
    const float *gate = beta ? scale : NULL;
    size_t i, j, end;
    for (i = 0; i < count; i += cols) {
        end = count - i < cols ? count - i : cols;
        for (j = 0; j + CKCA__VW <= end; j += CKCA__VW) {
            CKCA__V d = CKCA__SUB(CKCA__LOAD(x + i + j), CKCA__LOAD(mean + j));
            CKCA__V g = CKCA__NAME(ckca__gate)(CKCA__LOAD(dy + i + j), d, y ? y + i + j : NULL, gate ? gate + j : NULL,
                                               gate ? beta + j : NULL);
            d = CKCA__FMA(d, CKCA__LOAD(b + j), CKCA__LOAD(c + j));
            CKCA__STORE(dx + i + j, CKCA__SUB(CKCA__MUL(g, CKCA__LOAD(scale + j)), d));
            if (dresidual) CKCA__STORE(dresidual + i + j, accumulate ? CKCA__ADD(g, CKCA__LOAD(dresidual + i + j)) : g);
        }
        for (; j < end; j++) {
            float d = x[i + j] - mean[j];
            float g = CKCA__NAME(ckca__gate_one)(dy[i + j], d, y ? y + i + j : NULL, gate ? gate + j : NULL,
                                                 gate ? beta + j : NULL);
            dx[i + j] = scale[j] * g - (d * b[j] + c[j]);
            if (dresidual) dresidual[i + j] = accumulate ? dresidual[i + j] + g : g;
        }
    }
}

/* y = relu?(a + b). b may be NULL. */
static void CKCA__NAME(ckca__add)(size_t count, const float *a, const float *b, int relu, float *y) {
    const CKCA__V zero = CKCA__SET(0);
    size_t i = 0;
    for (; i + CKCA__VW <= count; i += CKCA__VW) {
        CKCA__V v = CKCA__LOAD(a + i);
        if (b) v = CKCA__ADD(v, CKCA__LOAD(b + i));
        if (relu) v = CKCA__MAX(zero, v);
        CKCA__STORE(y + i, v);
    }
    for (; i < count; i++) {
        float v = b ? a[i] + b[i] : a[i];
        y[i] = relu && v <= 0 ? 0 : v;
    }
}

/* dx (+)= dy where y > 0. */
static void CKCA__NAME(ckca__add_backward)(size_t count, const float *y, const float *dy, float *dx, int accumulate) {
    size_t i = 0;
    for (; i + CKCA__VW <= count; i += CKCA__VW) {
        CKCA__V g = CKCA__LOAD(dy + i);
        if (y) g = CKCA__WHERE_POSITIVE(CKCA__LOAD(y + i), g);
        CKCA__STORE(dx + i, accumulate ? CKCA__ADD(g, CKCA__LOAD(dx + i)) : g);
    }
    for (; i < count; i++) {
        float g = y && !(y[i] > 0) ? 0 : dy[i];
        dx[i] = accumulate ? dx[i] + g : g;
    }
}

static void CKCA__NAME(ckca__sgd)(size_t count, float *w, const float *g, float *v, float lr, float momentum,
                                  float weight_decay, int nesterov, float gscale) {
    const CKCA__V m = CKCA__SET(momentum), decay = CKCA__SET(weight_decay), s = CKCA__SET(gscale),
                  rate = CKCA__SET(-lr);
    size_t i = 0;
    for (; i + CKCA__VW <= count; i += CKCA__VW) {
        CKCA__V to = CKCA__LOAD(w + i);
        CKCA__V d = CKCA__FMA(decay, to, CKCA__MUL(CKCA__LOAD(g + i), s));
        CKCA__V step = CKCA__FMA(m, CKCA__LOAD(v + i), d);
        CKCA__STORE(v + i, step);
        if (nesterov) step = CKCA__FMA(m, step, d);
        CKCA__STORE(w + i, CKCA__FMA(rate, step, to));
    }
    for (; i < count; i++) {
        float d = g[i] * gscale + weight_decay * w[i];
        v[i] = momentum * v[i] + d;
        w[i] -= lr * (nesterov ? d + momentum * v[i] : v[i]);
    }
}

/* a . b: float sums of runs of 4096 values, added in double precision. */
static double CKCA__NAME(ckca__dot)(size_t count, const float *a, const float *b) {
    float lane[CKCA__VW];
    double sum = 0;
    size_t i = 0, end;
    int j;
    while (i + 2 * CKCA__VW <= count) {
        CKCA__V s = CKCA__SET(0), t = s;
        end = count - i < 4096 ? count : i + 4096;
        for (; i + 2 * CKCA__VW <= end; i += 2 * CKCA__VW) {
            s = CKCA__FMA(CKCA__LOAD(a + i), CKCA__LOAD(b + i), s);
            t = CKCA__FMA(CKCA__LOAD(a + i + CKCA__VW), CKCA__LOAD(b + i + CKCA__VW), t);
        }
        CKCA__STORE(lane, CKCA__ADD(s, t));
        for (j = 0; j < CKCA__VW; j++) sum += lane[j];
    }
    for (; i < count; i++) sum += (double)a[i] * b[i];
    return sum;
}

/* y (+)= alpha a + beta b. */
static void CKCA__NAME(ckca__combine)(size_t count, float alpha, const float *a, float beta, const float *b, float *y,
                                      int accumulate) {
    const CKCA__V va = CKCA__SET(alpha), vb = CKCA__SET(beta);
    size_t i = 0;
    for (; i + CKCA__VW <= count; i += CKCA__VW) {
        CKCA__V v = CKCA__FMA(va, CKCA__LOAD(a + i), CKCA__MUL(vb, CKCA__LOAD(b + i)));
        CKCA__STORE(y + i, accumulate ? CKCA__ADD(v, CKCA__LOAD(y + i)) : v);
    }
    for (; i < count; i++) y[i] = alpha * a[i] + beta * b[i] + (accumulate ? y[i] : 0);
}

/* Vectors of 32-bit integers and of bytes with as many lanes as a CKCA__V. Comparing two CKCA__V gives the former, -1
   where true (GNU C's vector extensions). */
typedef int CKCA__NAME(ckca__ints) __attribute__((vector_size(4 * CKCA__VW)));
typedef unsigned char CKCA__NAME(ckca__bytes) __attribute__((vector_size(CKCA__VW)));

/* One output pixel of a max pooling: see ckca__naive_maxpool_pixel. */
static void CKCA__NAME(ckca__maxpool_pixel)(int c, int taps, const float *const *from, const ckca__norm *norm,
                                            const unsigned char *position, float *y, unsigned char *at) {
    int j = 0, t;
    for (; j + CKCA__VW <= c; j += CKCA__VW) {
        CKCA__V best = CKCA__SET(-INFINITY);
        CKCA__NAME(ckca__ints) where = {0}, wins, tap;
        CKCA__NAME(ckca__bytes) narrow;
        for (t = 0; t < taps; t++) {
            CKCA__V v = CKCA__LOAD(from[t] + j);
            if (norm) v = CKCA__NAME(ckca__norm)(norm, j, v);
            wins = (CKCA__NAME(ckca__ints))(v > best) | (CKCA__NAME(ckca__ints))(v != v);
            tap = where & 0;
            tap += position[t];
            where = (wins & tap) | (~wins & where);
            best = (CKCA__V)((wins & (CKCA__NAME(ckca__ints))v) | (~wins & (CKCA__NAME(ckca__ints))best));
        }
        CKCA__STORE(y + j, best);
        narrow = __builtin_convertvector(where, CKCA__NAME(ckca__bytes));
        if (at) memcpy(at + j, &narrow, sizeof narrow);
    }
    for (; j < c; j++) {
        unsigned char where = 0;
        y[j] = -INFINITY;
        for (t = 0; t < taps; t++)
            if (from[t][j] > y[j] || from[t][j] != from[t][j]) y[j] = from[t][j], where = position[t];
        if (at) at[j] = where;
    }
}

/* One input pixel's gradient: see ckca__naive_maxpool_pixel_backward. */
static void CKCA__NAME(ckca__maxpool_pixel_backward)(int c, int taps, const ptrdiff_t *from,
                                                     const unsigned char *position, const float *dy,
                                                     const unsigned char *at, float *dx, int accumulate) {
    int j = 0, t;
    for (; j + CKCA__VW <= c; j += CKCA__VW) {
        CKCA__V sum = accumulate ? CKCA__LOAD(dx + j) : CKCA__SET(0);
        for (t = 0; t < taps; t++) {
            CKCA__V g = CKCA__LOAD(dy + from[t] + j);
            CKCA__NAME(ckca__bytes) narrow;
            CKCA__NAME(ckca__ints) won;
            memcpy(&narrow, at + from[t] + j, sizeof narrow);
            won = __builtin_convertvector(narrow, CKCA__NAME(ckca__ints)) == position[t];
            sum = CKCA__ADD(sum, (CKCA__V)(won & (CKCA__NAME(ckca__ints))g));
        }
        CKCA__STORE(dx + j, sum);
    }
    for (; j < c; j++) {
        float sum = accumulate ? dx[j] : 0;
        for (t = 0; t < taps; t++)
            if (at[from[t] + j] == position[t]) sum += dy[from[t] + j];
        dx[j] = sum;
    }
}

#if CKCA__PASS != 128
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#undef CKCA__NAME
#undef CKCA__VW
#undef CKCA__V
#undef CKCA__LOAD
#undef CKCA__STORE
#undef CKCA__SET
#undef CKCA__ADD
#undef CKCA__SUB
#undef CKCA__MUL
#undef CKCA__FMA
#undef CKCA__MAX
#undef CKCA__WHERE_POSITIVE
#endif /* CKCA__PASS */

#if defined(CKCA_IMPLEMENTATION) && defined(CKCA__HOST) && !defined(CKCA__PASS) && !defined(CKCA__HOST_OPS)
#define CKCA__HOST_OPS

/* ===================================================================================================================
   HOST OPS                                                                                                      >>ops

   Each op splits its work into tasks; each task is one thread's call of a kernel. What a task adds up, and in which
   order, follows from shapes alone, never from the number of threads. In the forward pass and the input gradient of a
   convolution a picture's results do not depend on the other pictures, but their last bits may depend on the batch
   size: few tiles are summed directly, more use Winograd's algorithm.
   =================================================================================================================== */

/* ---- memory ---- */

/* On the host, device memory is ordinary memory, and no call fails later. */
static ckca_status ckca__device_init(ckca_context *ctx) {
    (void)ctx;
    return CKCA_OK;
}
static void ckca__device_free(ckca_context *ctx) { (void)ctx; }
static ckca_status ckca__device_status(ckca_context *ctx) {
    (void)ctx;
    return CKCA_OK;
}
static int ckca__device_record(ckca_context *ctx, void **recording) {
    (void)ctx, (void)recording;
    return 1;
}
static void ckca__device_recorded(ckca_context *ctx, void **recording) { (void)ctx, (void)recording; }
static void ckca__device_forget(ckca_context *ctx, void **recording) { (void)ctx, (void)recording; }
static void *ckca__device_alloc(ckca_context *ctx, size_t bytes) { return ckca__alloc(ctx, bytes); }
static void ckca__device_release(ckca_context *ctx, void *memory, size_t bytes) {
    (void)bytes;
    ckca__release(ctx, memory);
}
static void ckca__device_copy(ckca_context *ctx, void *to, const void *from, size_t bytes) {
    (void)ctx;
    if (bytes) memcpy(to, from, bytes);
}
static void ckca__device_upload(ckca_context *ctx, void *device, const void *host, size_t bytes) {
    ckca__device_copy(ctx, device, host, bytes);
}
static void ckca__device_download(ckca_context *ctx, void *host, const void *device, size_t bytes) {
    ckca__device_copy(ctx, host, device, bytes);
}
static void ckca__device_zero(ckca_context *ctx, void *device, size_t bytes) {
    (void)ctx;
    if (bytes) memset(device, 0, bytes);
}
static size_t ckca__device_free_bytes(const ckca_context *ctx) {
    (void)ctx;
    return SIZE_MAX;
}
static void *ckca__device_staging_open(ckca_context *ctx, size_t bytes) { return ckca__alloc(ctx, bytes); }
static void *ckca__device_staging_buffer(ckca_context *ctx, void *staging) {
    (void)ctx;
    return staging;
}
static void ckca__device_staging_send(ckca_context *ctx, void *staging, void *device, size_t bytes) {
    ckca__device_copy(ctx, device, staging, bytes);
}
static void ckca__device_staging_close(ckca_context *ctx, void *staging) { ckca__release(ctx, staging); }

static ckca_status ckca__device_ranks_init(ckca_context *ctx) {
    (void)ctx;
    return CKCA_OK;
}
static void ckca__device_ranks_sum(ckca_context *ctx, size_t count, float share, float *x) {
    size_t i;
    if (share < 1)
        for (i = 0; i < count; i++) x[i] *= share;
    if (!ctx->ranks_broken) ctx->ranks_broken = ctx->ranks.sum_start(x, count, ctx->ranks.user) != 0;
}
static void ckca__device_ranks_poll(ckca_context *ctx) {
    if (!ctx->ranks_broken && ctx->ranks.sum_poll) ctx->ranks_broken = ctx->ranks.sum_poll(ctx->ranks.user) != 0;
}
static void ckca__device_ranks_wait(ckca_context *ctx) {
    if (!ctx->ranks_broken) ctx->ranks_broken = ctx->ranks.sum_wait(ctx->ranks.user) != 0;
}

/* ---- how work is split ---- */

/* Long arrays are processed in blocks whose number and size depend on the shape alone. Sums are taken per block and
   then added in the order of the blocks. */
#define CKCA__SUM_BLOCKS 256   /* blocks of a long sum, a double each */
#define CKCA__BLOCK 32768      /* values per block of element-wise ops */
#define CKCA__TABLE_WIDTH 1024 /* floats that a table or a wide sum holds, see ckca__fused_rows */

/* Values of a map of n x h x w x c. */
static size_t ckca__map_size(int n, int h, int w, int c) { return (size_t)n * (size_t)h * (size_t)w * (size_t)c; }

/* ckca__parallel, but on the caller's thread alone if the tasks cover too few values to be worth waking others. */
static void ckca__parallel_over(ckca_context *ctx, size_t values, int tasks,
                                void (*work)(void *job, int task, int thread), void *job) {
    ckca__parallel_run(ctx, tasks, values <= CKCA__BLOCK / 2, 0, work, job);
}

/* The same from the last task to the first: the end of what the previous pass touched is still in cache. */
static void ckca__parallel_over_reverse(ckca_context *ctx, size_t values, int tasks,
                                        void (*work)(void *job, int task, int thread), void *job) {
    ckca__parallel_run(ctx, tasks, values <= CKCA__BLOCK / 2, 1, work, job);
}

static int ckca__blocks(size_t count) { return (int)((count + CKCA__BLOCK - 1) / CKCA__BLOCK); }
static size_t ckca__block_size(size_t count, int b) {
    size_t left = count - (size_t)b * CKCA__BLOCK;
    return left < CKCA__BLOCK ? left : CKCA__BLOCK;
}

/* How many rows of c channels to treat as one, so that few channels, or an odd number of them, fill whole vectors. */
static size_t ckca__fused_rows(const ckca_context *ctx, int c) {
    size_t width = (size_t)ckca__isas[ctx->isa].width, m = 1;
    while (m * (size_t)c % width) m++;
    while (m * (size_t)c < 64) m *= 2;
    return m * (size_t)c <= CKCA__TABLE_WIDTH ? m : 1;
}

/* Rows per block of batch norm's sums: at most 128 blocks, of at least 64 rows and 16384 values. */
static size_t ckca__block_rows(const ckca_context *ctx, size_t rows, int c) {
    size_t block = (rows + 127) / 128;
    if (block < 64) block = 64;
    if (block < (size_t)(16384 / c)) block = (size_t)(16384 / c);
    return ckca__round_up(block, 4 * ckca__fused_rows(ctx, c));
}

/* Batch norm needs the most: per channel two doubles of sums, five floats of tables (up to CKCA__TABLE_WIDTH more each,
   to fill vectors) and three floats per block. Monotonic in rows, so the last, short batch fits too. */
static size_t ckca__op_workspace(const ckca_context *ctx, size_t rows, int c) {
    size_t blocks = rows / 64 + 1 < 128 ? rows / 64 + 1 : 128;
    (void)ctx;
    return ckca__sum(CKCA__SUM_BLOCKS * sizeof(double) + 20 * CKCA__TABLE_WIDTH,
                     ckca__mul((size_t)c, 36 + 12 * blocks));
}

/* ---- convolution ---- */

#ifdef CKCA__SIMD
/* A 1 x 1 convolution has no neighbours: all pixels of the batch become one picture of one pixel per row. */
static ckca__conv ckca__conv_flat(const ckca__conv *shape) {
    ckca__conv s = *shape;
    double pixels = (double)s.n * s.h * s.w;
    if (s.r != 1 || s.s != 1 || s.stride != 1 || s.pad || pixels > INT_MAX) return s;
    s.h = s.p = (int)pixels;
    s.n = s.w = s.q = 1;
    return s;
}
/* One axis of a correlation, split into phases. In the input gradient, dx's pixel i meets w's tap t at dy's pixel (i +
   pad - t) / stride if that is whole, that is if t = i + pad modulo stride; as t decreases, dy's pixel increases.
   Returns the smallest from; *extra is the extent of all taps from there. */
static int ckca__conv_axes(ckca__axis *axis, int gradient, int taps, int stride, int pad, int outputs, int *extra) {
    int spread = gradient ? stride : 1, i, before = 0, low = INT_MAX, high = INT_MIN;
    for (i = 0; i < spread; i++) {
        ckca__axis *a = &axis[i];
        int first = gradient ? (i + pad) % stride : 0;
        a->taps = !gradient ? taps : first < taps ? (taps - first + stride - 1) / stride : 0;
        a->first = gradient ? first + stride * (a->taps - 1) : 0;
        a->from = gradient ? (i + pad) / stride - (a->taps - 1) : -pad;
        a->before = before;
        a->at = i;
        a->count = outputs > i ? (outputs - i + spread - 1) / spread : 0;
        before += a->taps;
        if (a->taps && a->from < low) low = a->from;
        if (a->taps && a->from + a->taps > high) high = a->from + a->taps;
    }
    for (i = 0; i < spread; i++)
        if (!axis[i].taps) axis[i].from = low;
    *extra = high - low;
    return low;
}
/* Plans the tasks of the forward pass (gradient 0) or the input gradient (1) of a shape. */
static void ckca__conv_plan(ckca__conv_job *job, const ckca__conv *shape, int gradient) {
    ckca__conv s = ckca__conv_flat(shape);
    int extra_w, bands, least;
    size_t region, row;
    memset(job, 0, sizeof *job);
    job->n = s.n;
    job->h = gradient ? s.p : s.h;
    job->w = gradient ? s.q : s.w;
    job->c = gradient ? s.k : s.c;
    job->oh = gradient ? s.h : s.p;
    job->ow = gradient ? s.w : s.q;
    job->k = gradient ? s.c : s.k;
    job->r = s.r;
    job->s = s.s;
    job->step = gradient ? 1 : s.stride;
    job->spread = gradient ? s.stride : 1;
    job->tap_step = gradient ? -s.stride : 1;
    job->norm = gradient ? NULL : s.norm;
    job->tap = s.c;
    job->in = gradient ? (ptrdiff_t)s.r * s.s * s.c : 1;
    job->out = gradient ? 1 : (ptrdiff_t)s.r * s.s * s.c;
    job->top = ckca__conv_axes(job->y, gradient, s.r, s.stride, s.pad, job->oh, &job->extra_h);
    job->left = ckca__conv_axes(job->x, gradient, s.s, s.stride, s.pad, job->ow, &extra_w);
    job->width = (job->x->count - 1) * job->step + extra_w;
    job->in_place = job->top >= 0 && job->left >= 0 && job->left + job->width <= job->w &&
                    job->top + (job->y->count - 1) * job->step + job->extra_h <= job->h &&
                    (!job->norm || s.r * s.s == 1);

    /* As many rows as fit the region, or whole pictures if several fit; fewer if that makes too few tasks. */
    row = (size_t)job->width * (size_t)job->c;
    job->rows = CKCA__CONV_REGION / ((size_t)job->step * row) < (size_t)job->y->count
                    ? (int)(CKCA__CONV_REGION / ((size_t)job->step * row))
                    : job->y->count;
    if (job->rows < 1) job->rows = 1;
    bands = (job->y->count + job->rows - 1) / job->rows;
    least = (CKCA__CONV_TASKS + job->n - 1) / job->n;
    if (bands < least) bands = least;
    job->rows = (job->y->count + bands - 1) / bands;
    region = ((size_t)(job->rows - 1) * (size_t)job->step + (size_t)job->extra_h) * row;
    job->pictures = 1;
    if (bands == 1)
        while (region * (size_t)(job->pictures + 1) <= CKCA__CONV_REGION &&
               (job->pictures + 1) * CKCA__CONV_TASKS <= job->n &&
               job->pictures * job->y->count * job->x->count < CKCA__CONV_LIST)
            job->pictures++;
    job->scratch_size = job->in_place ? 0 : ckca__round_up(region * (size_t)job->pictures, 16);

    /* Pixels read in place need no region: a list takes as many pixels as fit L2 beside the weights, and a task takes
       whole tiles. */
    job->list = CKCA__CONV_LIST;
    job->copy_pixels = job->in_place && (job->norm || job->c % 1024 == 0);
    if (job->in_place) {
        int limit = 3 * CKCA__CONV_REGION / 2 / job->c / 12 * 12;
        if (job->list > limit) job->list = limit > 12 ? limit : 12;
    }
    if (job->in_place && s.n == 1 && s.w == 1 && s.q == 1) {
        int share = (s.h / CKCA__CONV_TASKS + 11) / 12 * 12;
        if (job->list > share) job->list = share > 12 ? share : 12;
        job->rows = s.h / (4 * CKCA__CONV_TASKS) / job->list * job->list;
        if (job->rows < job->list) job->rows = job->list;
        job->next_offset = (ptrdiff_t)job->rows * job->c;
    }
    if (job->copy_pixels) job->scratch_size = (size_t)job->list * (size_t)(job->c + 16);
}
/* Floats from one thread's scratch to the next. Rounded up to 2 MiB, a huge page, so that it is mostly the same for all
   ops: each thread then finds its scratch in its own cache, not in another core's (10% of a ResNet-20 step on two cores
   without a shared cache). */
static size_t ckca__scratch_stride(const ckca_context *ctx, size_t size) {
    return ckca__round_up(size, ctx->threads > 1 ? ((size_t)1 << 21) / sizeof(float) : 16);
}
static int ckca__conv_vector(ckca_isa isa) { return ckca__isas[isa].width; } /* floats per vector */
/* Packs the weights of one block of output channels of one phase. */
static void ckca__conv_pack_run(void *argument, int task, int thread) {
    const ckca__conv_job *job = (const ckca__conv_job *)argument;
    int block = 2 * ckca__conv_vector(job->isa), blocks = (job->k + block - 1) / block;
    int a = task / blocks / job->spread, b = task / blocks % job->spread;
    (void)thread;
    CKCA__DISPATCH(job, ckca__conv_pack, (job, a, b, task % blocks * block));
}
static void ckca__conv_task_run(void *argument, int task, int thread) {
    const ckca__conv_job *job = (const ckca__conv_job *)argument;
    CKCA__DISPATCH(job, ckca__conv_task, (job, task, job->scratch + (size_t)thread * job->scratch_size));
}
/* Packs the weights, then runs the tasks. ws: each thread's scratch, then the packed weights. */
static void ckca__conv_run(ckca_context *ctx, ckca__conv_job *job, void *ws) {
    int block = 2 * ckca__conv_vector(ctx->isa), blocks = (job->k + block - 1) / block, tasks;
    job->isa = ctx->isa;
    job->scratch_size = ckca__scratch_stride(ctx, job->scratch_size);
    job->scratch = (float *)ws;
    job->packed = job->scratch + (size_t)ctx->threads * job->scratch_size;
    ckca__parallel(ctx, job->spread * job->spread * blocks, ckca__conv_pack_run, job);
    tasks = (job->n + job->pictures - 1) / job->pictures * ((job->y->count + job->rows - 1) / job->rows);
    ckca__parallel(ctx, tasks, ckca__conv_task_run, job);
}
/* Plans the weight gradient: groups of pixels with sums of their own, as long as these stay small; then ranges of the
   side that is more expensive to read, so that it is read once. */
static void ckca__conv_weight_plan(const ckca_context *ctx, ckca__wgrad_job *job, const ckca__conv *s) {
    size_t sums = ckca__map_size(s->k, s->r, s->s, s->c), pixels = ckca__map_size(s->n, s->p, s->q, 1), most = pixels;
    int splits, both;
    memset(job, 0, sizeof *job);
    job->s = *s;
    job->swap = s->c < ckca__conv_vector(ctx->isa);
    job->rows = job->swap ? s->r * s->s * s->c : s->k;
    job->lanes = job->swap ? s->k : s->c;
    most /= CKCA__CONV_PIXELS;
    if (most > CKCA__CONV_PARTIAL / sums) most = CKCA__CONV_PARTIAL / sums;
    job->groups = most > CKCA__CONV_GROUPS ? CKCA__CONV_GROUPS : most ? (int)most : 1;
    job->partial = job->swap || job->groups > 1;
    splits = (CKCA__CONV_GROUPS + job->groups - 1) / job->groups;
    job->task_rows = job->rows;
    job->task_lanes = job->lanes;
    if (job->rows >= (job->swap ? 1.0 : (double)s->r * s->s) * job->lanes)
        job->task_rows = ((job->rows + splits - 1) / splits + 3) / 4 * 4;
    else
        job->task_lanes = ((job->lanes + splits - 1) / splits + 31) / 32 * 32;
    job->row_tasks = (job->rows + job->task_rows - 1) / job->task_rows;
    job->lane_tasks = (job->lanes + job->task_lanes - 1) / job->task_lanes;
    job->pixels = CKCA__CONV_PANELS / (job->task_rows + job->task_lanes);
    if (job->pixels > CKCA__CONV_PIXELS) job->pixels = CKCA__CONV_PIXELS;
    if (job->pixels < 16) job->pixels = 16;

    /* Scratch for any split and so for any number of pixels: the last, short batch fits too. */
    both = job->rows + job->lanes;
    most = (size_t)CKCA__CONV_PIXELS * (size_t)both;
    if (most > CKCA__CONV_PANELS) most = CKCA__CONV_PANELS;
    if (most < (size_t)16 * (size_t)both) most = (size_t)16 * (size_t)both;
    job->at_b =
        (size_t)job->pixels * ckca__round_up((size_t)job->task_rows, 12) + (size_t)(16 * (job->task_rows / 6 + 1));
    job->at_b = ckca__round_up(job->at_b, 16);
    job->at_zeros = job->at_b + (size_t)job->pixels * ckca__round_up((size_t)job->task_lanes, 32) +
                    (size_t)(16 * (job->task_lanes / 8 + 1));
    job->at_patches = job->at_zeros + ckca__round_up((size_t)job->task_lanes, 16);
    job->scratch_size =
        most + CKCA__CONV_PIXELS * 48 + (size_t)(16 * (job->rows / 6 + job->lanes / 8 + 4)) + (size_t)job->lanes + 32;
    if (job->swap) job->scratch_size += (size_t)CKCA__CONV_PIXELS * (size_t)job->rows;
    job->scratch_size = ckca__scratch_stride(ctx, job->scratch_size);
}
static void ckca__conv_weight_run(void *argument, int task, int thread) {
    const ckca__wgrad_job *job = (const ckca__wgrad_job *)argument;
    CKCA__DISPATCH(job, ckca__conv_weight_task, (job, task, job->scratch + (size_t)thread * job->scratch_size));
}
/* Output channel k: dw += the sums of all groups. */
static void ckca__conv_weight_reduce(void *argument, int k, int thread) {
    const ckca__wgrad_job *job = (const ckca__wgrad_job *)argument;
    ptrdiff_t per = (ptrdiff_t)job->s.r * job->s.s * job->s.c, all = per * job->s.k, i;
    float *to = job->dw + k * per;
    const float *sums = job->sums;
    int g;
    (void)thread;
    for (g = 0; g < job->groups; g++, sums += all)
        if (job->swap)
            for (i = 0; i < per; i++) to[i] += sums[i * job->s.k + k];
        else
            for (i = 0; i < per; i++) to[i] += sums[k * per + i];
}
typedef struct ckca__bias_gradient {
    size_t rows;
    int k;
    const float *dy;
    float *dbias;
} ckca__bias_gradient;
/* One block of 32 channels. */
static void ckca__conv_bias_block(void *job, int block, int thread) {
    const ckca__bias_gradient *a = (const ckca__bias_gradient *)job;
    int first = block * 32, count = a->k - first < 32 ? a->k - first : 32, i;
    double total[32];
    ptrdiff_t row, begin, rows = (ptrdiff_t)a->rows;
    (void)thread;
    for (i = 0; i < 32; i++) total[i] = 0;
    for (begin = 0; begin < rows; begin += 256) {
        float sum[32];
        memset(sum, 0, sizeof sum);
        for (row = begin; row < rows && row < begin + 256; row++)
            for (i = 0; i < count; i++) sum[i] += a->dy[row * a->k + first + i];
        for (i = 0; i < count; i++) total[i] += sum[i];
    }
    for (i = 0; i < count; i++) a->dbias[first + i] += (float)total[i];
}
/* dbias[k] += the sum over rows of dy[row][k], in double precision over blocks of 256 rows. */
static void ckca__conv_bias_gradient(ckca_context *ctx, size_t rows, int k, const float *dy, float *dbias) {
    ckca__bias_gradient job = {rows, k, dy, dbias};
    ckca__parallel(ctx, (k + 31) / 32, ckca__conv_bias_block, &job);
}
static int ckca__conv_is_naive(const ckca_context *ctx, const ckca__conv *s) {
    return ctx->isa == CKCA_ISA_PLAIN || s->stride > CKCA__CONV_MAX_STRIDE;
}
/* Plans the forward pass (0), the input gradient (1) or the weight gradient (2) of a shape with Winograd's algorithm.
   Returns 0 if direct sums are faster or the shape is unsupported: too few tiles to amortise the transform of the
   weights, tiles that are mostly margin, channels that do not fill vectors. */
static int ckca__wino_plan(const ckca_context *ctx, ckca__wino_job *job, const ckca__conv *s, int pass) {
    int lanes, blocks, channels, least;
    if (ctx->no_winograd || ckca__conv_is_naive(ctx, s) || s->r != 3 || s->s != 3 || s->stride > 2 || s->pad > 2 ||
        s->c % 16 || s->k % 16)
        return 0;
    if (s->stride == 2 && (s->pad != 1 || s->c < 32 || s->k < 32)) return 0; /* too few channels: not worth it */
    memset(job, 0, sizeof *job);
    job->isa = ctx->isa;
    job->stride = s->stride;
    job->rotated180 = pass == 1;
    job->axis = s->stride == 1 ? 6 : 9;
    job->elements = job->axis * job->axis;
    job->outputs = s->stride == 2 && job->rotated180 ? 8 : 4;
    job->source.h = job->rotated180 ? s->p : s->h;
    job->source.w = job->rotated180 ? s->q : s->w;
    job->source.c = job->source.channels = job->c = job->rotated180 ? s->k : s->c;
    job->source.pad = !job->rotated180 ? s->pad : s->stride == 1 ? 2 - s->pad : 0;
    job->source.step = s->stride == 2 && !job->rotated180 ? 8 : 4;
    job->source.norm = job->rotated180 ? NULL : s->norm;
    job->dy.step = 4;
    job->dy.h = s->p;
    job->dy.w = s->q;
    job->dy.c = job->dy.channels = s->k;
    job->oh = job->rotated180 ? s->h : s->p;
    job->ow = job->rotated180 ? s->w : s->q;
    job->k = job->rotated180 ? s->c : s->k;
    job->across = (job->ow + job->outputs - 1) / job->outputs;
    job->down = (job->oh + job->outputs - 1) / job->outputs;
    if ((double)s->n * job->across * job->down > INT_MAX / 2) return 0;
    job->tiles = s->n * job->across * job->down;
    if (job->tiles < 16 || (s->stride == 1 ? 0.5 : 0.7) * job->outputs * job->outputs * job->across * job->down >
                               (double)job->oh * job->ow)
        return 0;

    lanes = 2 * ckca__conv_vector(ctx->isa);
    blocks = (job->k + lanes - 1) / lanes;
    job->ranges = 1;
    job->parts = CKCA__WINO_TASKS;
    if (pass == 2) {
        double sums = (double)CKCA__WINO_ELEMENTS * job->c * job->k / CKCA__WINO_SUMS;
        job->ranges = sums > job->k / 16 ? job->k / 16 : (int)ceil(sums);
        job->parts = (CKCA__WINO_TASKS + job->ranges - 1) / job->ranges;
        if (s->stride == 2 && job->ranges > 1) return 0; /* too many passes over the sums */
    }
    while (job->parts > 1 && job->parts * 48 > job->tiles) job->parts /= 2; /* halving keeps shares even */
    if (pass < 2 && job->parts < 4) {
        job->parts = 1;
        job->ranges = blocks < 8 ? blocks : 8;
    }

    /* The widest range of output channels, then the scratch: zeros, pixels, then sums and a task's own weights; in the
       weight gradient dy and sums. Independent of the number of tiles, so the last, short batch fits too. */
    channels = pass == 2 ? (job->k / 16 + job->ranges - 1) / job->ranges * 16 : lanes;
    job->block = CKCA__WINO_BLOCK / (job->elements * (job->c + channels)) / 12 * 12;
    if (job->block > 96) job->block = 96;
    least = pass < 2 ? 24 : s->stride == 1 ? 72 : 36; /* amortises a pass over dw's sums in the transform domain */
    if (job->block < least) job->block = least;
    job->scratch_size = (size_t)(job->c > job->k ? job->c : job->k);
    job->scratch_size += (size_t)(job->elements * ckca__wino_pitch(job->block, job->c));
    job->scratch_size += (size_t)(job->elements * ckca__wino_pitch(job->block, channels));
    job->scratch_size +=
        (size_t)CKCA__WINO_ELEMENTS * (size_t)job->c * (size_t)(pass == 2 ? channels : (blocks + 7) / 8 * lanes);
    if (job->block > job->tiles) job->block = (job->tiles + 11) / 12 * 12;
    job->scratch_size = ckca__scratch_stride(ctx, job->scratch_size);
    return 1;
}
/* Workspace for all three passes, in floats. */
static size_t ckca__wino_workspace(const ckca_context *ctx, const ckca__conv *s) {
    size_t most = 0;
    int pass;
    for (pass = 0; pass < 3; pass++) {
        ckca__wino_job job;
        size_t floats;
        if (!ckca__wino_plan(ctx, &job, s, pass)) continue;
        /* Fewer tiles never need more parts, nor use one range where more tiles use several. */
        floats = job.scratch_size * (size_t)ctx->threads; /* scratch first, then what threads share */
        if (pass == 2)
            floats += job.parts > 1 ? (size_t)job.parts * 9 * (size_t)job.c * (size_t)job.k : 0;
        else if (job.ranges == 1)
            floats += (size_t)CKCA__WINO_ELEMENTS * (size_t)job.c * ckca__round_up((size_t)job.k, 32);
        if (floats > most) most = floats;
    }
    return most;
}
/* Transforms the weights of a block of output channels. */
static void ckca__wino_pack_run(void *argument, int b, int thread) {
    const ckca__wino_job *job = (const ckca__wino_job *)argument;
    int lanes = 2 * ckca__conv_vector(job->isa);
    (void)thread;
    CKCA__DISPATCH(job, ckca__wino_pack, (job, b, job->packed + (ptrdiff_t)b * CKCA__WINO_ELEMENTS * job->c * lanes));
}
static void ckca__wino_task_run(void *argument, int task, int thread) {
    const ckca__wino_job *job = (const ckca__wino_job *)argument;
    CKCA__DISPATCH(job, ckca__wino_task, (job, task, job->scratch + (size_t)thread * job->scratch_size));
}
static void ckca__wino_run(ckca_context *ctx, ckca__wino_job *job, void *ws) {
    int lanes = 2 * ckca__conv_vector(ctx->isa);
    job->scratch = (float *)ws;
    if (job->ranges == 1) {
        job->packed = job->scratch + (size_t)ctx->threads * job->scratch_size;
        ckca__parallel(ctx, (job->k + lanes - 1) / lanes, ckca__wino_pack_run, job);
    }
    ckca__parallel(ctx, job->parts * job->ranges, ckca__wino_task_run, job);
}
static void ckca__wino_weight_task_run(void *argument, int task, int thread) {
    const ckca__wino_job *job = (const ckca__wino_job *)argument;
    CKCA__DISPATCH(job, ckca__wino_weight_task, (job, task, job->scratch + (size_t)thread * job->scratch_size));
}
/* Output channel k: dw += the sums of all parts. */
static void ckca__wino_weight_reduce(void *argument, int k, int thread) {
    const ckca__wino_job *job = (const ckca__wino_job *)argument;
    ptrdiff_t per = (ptrdiff_t)9 * job->c, all = per * job->k, i;
    int part;
    (void)thread;
    for (part = 0; part < job->parts; part++)
        for (i = 0; i < per; i++) job->output[k * per + i] += job->sums[part * all + k * per + i];
}
static void ckca__wino_weight_run(ckca_context *ctx, ckca__wino_job *job, float *dw, void *ws) {
    job->output = dw;
    job->scratch = (float *)ws;
    job->sums = job->parts > 1 ? job->scratch + (size_t)ctx->threads * job->scratch_size : dw;
    ckca__parallel(ctx, job->parts * job->ranges, ckca__wino_weight_task_run, job);
    if (job->parts > 1) ckca__parallel(ctx, job->k, ckca__wino_weight_reduce, job);
}
#endif /* CKCA__SIMD */

#ifdef CKCA__SIMD
/* ---- grouped convolution: several groups at a time as an ordinary convolution, with zeros between groups ---- */

/* The shape of one bundle of groups: the fewest groups whose channels fill a vector of 16, both ways if there are so
   many. Few zeros are multiplied, and every pass uses the kernels of ordinary convolutions. */
static ckca__conv ckca__bundle_shape(const ckca__conv *s) {
    const int inputs = s->c / s->groups, outputs = s->k / s->groups, least = inputs < outputs ? inputs : outputs;
    ckca__conv b = *s;
    int size = 1;
    while (size < s->groups && (s->groups % size || size * least < 16)) size++;
    b.c = size * inputs;
    b.k = size * outputs;
    b.groups = 0;
    return b;
}

typedef struct ckca__bundle_copy {
    size_t rows, block, all, first, width; /* rows of all channels, of which width from first on are the bundle's */
    float *whole, *part;
    int back, add; /* 1: from part to whole; 1: adds */
} ckca__bundle_copy;
static void ckca__bundle_copy_block(void *job, int b, int thread) {
    const ckca__bundle_copy *a = (const ckca__bundle_copy *)job;
    size_t i = (size_t)b * a->block, end = a->rows - i < a->block ? a->rows : i + a->block, j;
    (void)thread;
    for (; i < end; i++) {
        float *whole = a->whole + i * a->all + a->first, *part = a->part + i * a->width;
        if (!a->back)
            memcpy(part, whole, a->width * sizeof *part);
        else
            for (j = 0; j < a->width; j++) whole[j] = a->add ? whole[j] + part[j] : part[j];
    }
}
/* Copies a bundle's channels out of a map, or (back) into it. */
static void ckca__bundle_move(ckca_context *ctx, size_t rows, int all, int first, int width, float *whole, float *part,
                              int back, int add) {
    ckca__bundle_copy job = {
        rows, 1 + (CKCA__BLOCK / (size_t)width), (size_t)all, (size_t)first, (size_t)width, whole, part, back, add};
    ckca__parallel_over(ctx, rows * (size_t)width, (int)((rows + job.block - 1) / job.block), ckca__bundle_copy_block,
                        &job);
}
/* Copies the weights of the groups of a bundle to the blocks on the diagonal of the bundle's weights, or (back) adds
   those to the groups' gradients. w: the bundle's first weight. */
static void ckca__bundle_weights(const ckca__conv *s, const ckca__conv *b, float *w, float *part, int back) {
    const size_t inputs = (size_t)(s->c / s->groups), outputs = (size_t)(s->k / s->groups);
    const size_t taps = (size_t)s->r * (size_t)s->s;
    size_t k, tap, c;
    if (!back) memset(part, 0, (size_t)b->k * taps * (size_t)b->c * sizeof *part);
    for (k = 0; k < (size_t)b->k; k++)
        for (tap = 0; tap < taps; tap++) {
            float *of_group = w + (k * taps + tap) * inputs;
            float *of_bundle = part + (k * taps + tap) * (size_t)b->c + k / outputs * inputs;
            for (c = 0; c < inputs; c++)
                if (back)
                    of_group[c] += of_bundle[c];
                else
                    of_bundle[c] = of_group[c];
        }
}
/* Where a bundle's weights, input (gradient) and output (gradient) are in ws; the ordinary workspace follows. */
typedef struct ckca__bundle {
    float *w, *x, *y;
    void *ws;
    size_t floats; /* of the three */
} ckca__bundle;
static ckca__bundle ckca__bundle_layout(const ckca__conv *b, void *ws) {
    const size_t w = ckca__round_up(ckca__map_size(b->k, b->r, b->s, b->c), 16);
    const size_t x = ckca__round_up(ckca__map_size(b->n, b->h, b->w, b->c), 16);
    ckca__bundle at;
    at.w = (float *)ws;
    at.x = at.w + w;
    at.y = at.x + x;
    at.floats = w + x + ckca__round_up(ckca__map_size(b->n, b->p, b->q, b->k), 16);
    at.ws = at.w + at.floats;
    return at;
}
static float *ckca__not_const(const float *p) { return (float *)(uintptr_t)p; }

/* pass 0: the forward pass, from x to y; 1: the input gradient, from y (dy) to x (dx); 2: the weight gradient. */
static void ckca__grouped_conv(ckca_context *ctx, const ckca__conv *s, int pass, const float *x, const float *w,
                               const float *bias, const float *residual, int relu, int accumulate, const float *y,
                               float *dw, float *dbias, void *ws) {
    const ckca__conv b = ckca__bundle_shape(s);
    const ckca__bundle at = ckca__bundle_layout(&b, ws);
    const size_t in_rows = ckca__map_size(s->n, s->h, s->w, 1), out_rows = ckca__map_size(s->n, s->p, s->q, 1);
    const size_t per = ckca__map_size(s->r, s->s, s->c / s->groups, 1);
    float *from = ckca__not_const(x), *to = ckca__not_const(y);
    int c, k;
    for (c = k = 0; k < s->k; c += b.c, k += b.k) {
        if (pass < 2) ckca__bundle_weights(s, &b, ckca__not_const(w) + (size_t)k * per, at.w, 0);
        if (pass != 1) ckca__bundle_move(ctx, in_rows, s->c, c, b.c, from, at.x, 0, 0);
        if (pass > 0) ckca__bundle_move(ctx, out_rows, s->k, k, b.k, to, at.y, 0, 0);
        if (pass == 0) {
            if (residual) ckca__bundle_move(ctx, out_rows, s->k, k, b.k, ckca__not_const(residual), at.y, 0, 0);
            ckca__op_conv_forward(ctx, &b, at.x, at.w, bias ? bias + k : NULL, residual ? at.y : NULL, relu, at.y,
                                  at.ws);
            ckca__bundle_move(ctx, out_rows, s->k, k, b.k, to, at.y, 1, 0);
        } else if (pass == 1) {
            ckca__op_conv_backward_data(ctx, &b, at.y, at.w, at.x, 0, at.ws);
            ckca__bundle_move(ctx, in_rows, s->c, c, b.c, from, at.x, 1, accumulate);
        } else {
            memset(at.w, 0, ckca__map_size(b.k, b.r, b.s, b.c) * sizeof *at.w);
            ckca__op_conv_backward_weight(ctx, &b, at.x, at.y, at.w, dbias ? dbias + k : NULL, at.ws);
            ckca__bundle_weights(s, &b, dw + (size_t)k * per, at.w, 1);
        }
    }
}
#endif

CKCA__OP size_t ckca__conv_workspace(const ckca_context *ctx, const ckca__conv *s) {
    size_t taps = ckca__mul((size_t)s->r, (size_t)s->s),
           floats = ckca__mul(taps, ckca__mul((size_t)ckca__group_inputs(s), (size_t)s->k));
#ifdef CKCA__SIMD
    if (s->groups > 1 && !ckca__conv_is_naive(ctx, s)) {
        const ckca__conv b = ckca__bundle_shape(s);
        return ckca__sum(ckca__mul(ckca__bundle_layout(&b, NULL).floats, sizeof(float)), ckca__conv_workspace(ctx, &b));
    }
    if (!ckca__conv_is_naive(ctx, s)) {
        ckca__conv_job job;
        ckca__wgrad_job weight;
        int gradient;
        ckca__conv_weight_plan(ctx, &weight, s);
        if (floats < CKCA__CONV_PARTIAL / CKCA__CONV_GROUPS)
            floats *= CKCA__CONV_GROUPS; /* partial sums */
        else if (floats < CKCA__CONV_PARTIAL)
            floats = CKCA__CONV_PARTIAL;
        floats = ckca__sum(floats, ckca__mul(weight.scratch_size, (size_t)ctx->threads));
        for (gradient = 0; gradient < 2; gradient++) {
            size_t packed;
            ckca__conv_plan(&job, s, gradient);
            packed = ckca__mul(taps, ckca__mul((size_t)job.c, ckca__round_up((size_t)job.k, 16)));
            packed = ckca__sum(packed, ckca__mul(ckca__scratch_stride(ctx, job.scratch_size), (size_t)ctx->threads));
            if (packed > floats) floats = packed;
        }
        if (ckca__wino_workspace(ctx, s) > floats) floats = ckca__wino_workspace(ctx, s);
    }
#endif
    (void)ctx;
    return ckca__mul(floats, sizeof(float));
}

CKCA__OP int ckca__may_take_statistics(const ckca_context *ctx, const ckca__conv *s) { /* they would cost the same */
    (void)ctx;
    (void)s;
    return 0;
}

/* Here convolutions pack their weights themselves. */
CKCA__OP size_t ckca__packed_bytes(const ckca_context *ctx, const ckca__conv *s, int backward) {
    (void)ctx;
    (void)s;
    (void)backward;
    return 0;
}
CKCA__OP void ckca__op_pack_weights(ckca_context *ctx, int count, const ckca__conv *s, const float *const *w,
                                    int backward) {
    (void)ctx;
    (void)count;
    (void)s;
    (void)w;
    (void)backward;
}

CKCA__OP int ckca__may_norm(const ckca_context *ctx, const ckca__conv *s) {
#ifdef CKCA__SIMD
    return !ckca__conv_is_naive(ctx, s) && s->c % 16 == 0 && s->groups < 2; /* kernels normalise whole vectors */
#else
    (void)ctx;
    (void)s;
    return 0;
#endif
}

CKCA__OP void ckca__op_conv_forward(ckca_context *ctx, const ckca__conv *s, const float *x, const float *w,
                                    const float *bias, const float *residual, int relu, float *y, void *ws) {
#ifdef CKCA__SIMD
    ckca__wino_job wino;
    if (s->groups > 1 && !ckca__conv_is_naive(ctx, s)) {
        ckca__grouped_conv(ctx, s, 0, x, w, bias, residual, relu, 0, y, NULL, NULL, ws);
        return;
    }
    if (ckca__wino_plan(ctx, &wino, s, 0)) {
        wino.source.at = x;
        wino.weights = w;
        wino.bias = bias;
        wino.residual = residual;
        wino.relu = relu;
        wino.output = y;
        ckca__wino_run(ctx, &wino, ws);
        return;
    }
    if (!ckca__conv_is_naive(ctx, s)) {
        ckca__conv_job job;
        ckca__conv_plan(&job, s, 0);
        job.source = x;
        job.weights = w;
        job.bias = bias;
        job.residual = residual;
        job.relu = relu;
        job.output = y;
        ckca__conv_run(ctx, &job, ws);
        return;
    }
#endif
    ckca__naive_conv_forward(ctx, s, x, w, bias, residual, relu, y, (float *)ws);
}

CKCA__OP void ckca__op_conv_backward_data(ckca_context *ctx, const ckca__conv *s, const float *dy, const float *w,
                                          float *dx, int accumulate, void *ws) {
#ifdef CKCA__SIMD
    ckca__wino_job wino;
    if (s->groups > 1 && !ckca__conv_is_naive(ctx, s)) {
        ckca__grouped_conv(ctx, s, 1, dx, w, NULL, NULL, 0, accumulate, dy, NULL, NULL, ws);
        return;
    }
    if (ckca__wino_plan(ctx, &wino, s, 1)) {
        wino.source.at = dy;
        wino.weights = w;
        wino.residual = accumulate ? dx : NULL;
        wino.output = dx;
        ckca__wino_run(ctx, &wino, ws);
        return;
    }
    if (!ckca__conv_is_naive(ctx, s)) {
        ckca__conv_job job;
        ckca__conv_plan(&job, s, 1);
        job.source = dy;
        job.weights = w;
        job.residual = accumulate ? dx : NULL;
        job.output = dx;
        ckca__conv_run(ctx, &job, ws);
        return;
    }
#endif
    (void)ws;
    ckca__naive_conv_backward_data(ctx, s, dy, w, dx, accumulate);
}

CKCA__OP void ckca__op_conv_backward_weight(ckca_context *ctx, const ckca__conv *s, const float *x, const float *dy,
                                            float *dw, float *dbias, void *ws) {
#ifdef CKCA__SIMD
    ckca__wino_job wino;
    if (s->groups > 1 && !ckca__conv_is_naive(ctx, s)) {
        ckca__grouped_conv(ctx, s, 2, x, NULL, NULL, NULL, 0, 0, dy, dw, dbias, ws);
        return;
    }
    if (ckca__wino_plan(ctx, &wino, s, 2)) {
        wino.source.at = x;
        wino.dy.at = dy;
        ckca__wino_weight_run(ctx, &wino, dw, ws);
        if (dbias) ckca__conv_bias_gradient(ctx, ckca__map_size(s->n, s->p, s->q, 1), s->k, dy, dbias);
        return;
    }
    if (!ckca__conv_is_naive(ctx, s)) {
        ckca__wgrad_job job;
        ckca__conv_weight_plan(ctx, &job, s);
        job.isa = ctx->isa;
        job.x = x;
        job.dy = dy;
        job.dw = dw;
        job.scratch = (float *)ws;
        job.sums = job.partial ? job.scratch + job.scratch_size * (size_t)ctx->threads : dw;
        ckca__parallel(ctx, job.groups * job.row_tasks * job.lane_tasks, ckca__conv_weight_run, &job);
        if (job.partial) ckca__parallel(ctx, s->k, ckca__conv_weight_reduce, &job);
        if (dbias) ckca__conv_bias_gradient(ctx, ckca__map_size(s->n, s->p, s->q, 1), s->k, dy, dbias);
        return;
    }
#endif
    (void)ws;
    ckca__naive_conv_backward_weight(ctx, s, x, dy, dw, dbias);
}

/* A linear layer is a 1 x 1 convolution over n pictures of one pixel. */
static void ckca__linear_as_conv(ckca__conv *s, int n, int d, int k) {
    s->n = n;
    s->c = d;
    s->k = k;
    s->h = s->w = s->r = s->s = s->stride = s->p = s->q = 1;
    s->pad = s->groups = 0;
    s->norm = NULL;
}

CKCA__OP void ckca__op_linear_forward(ckca_context *ctx, int n, int d, int k, const float *x, const float *w,
                                      const float *bias, float *y, void *ws) {
    ckca__conv s;
    ckca__linear_as_conv(&s, n, d, k);
    ckca__op_conv_forward(ctx, &s, x, w, bias, NULL, 0, y, ws);
}

/* dx may be NULL: then only the parameters' gradients are computed. */
CKCA__OP void ckca__op_linear_backward(ckca_context *ctx, int n, int d, int k, const float *x, const float *w,
                                       const float *dy, float *dx, int accumulate, float *dw, float *dbias, void *ws) {
    ckca__conv s;
    ckca__linear_as_conv(&s, n, d, k);
    if (dx) ckca__op_conv_backward_data(ctx, &s, dy, w, dx, accumulate, ws);
    if (dw) ckca__op_conv_backward_weight(ctx, &s, x, dy, dw, dbias, ws);
}

/* ---- batch norm ---- */

#ifdef CKCA__SIMD
/* table[0..cols) = value[0..c), repeated. They may be the same array. */
static void ckca__broadcast_row(size_t cols, int c, const float *value, float *table) {
    size_t i;
    for (i = 0; i < cols; i += (size_t)c) memmove(table + i, value, (size_t)c * sizeof *table);
}
/* sum[j] = wide[j] + wide[j + c] + ... */
static void ckca__fold_sums(size_t cols, int c, const float *wide, float *sum) {
    size_t i;
    int j;
    for (j = 0; j < c; j++) sum[j] = wide[j];
    for (i = (size_t)c; i < cols; i += (size_t)c)
        for (j = 0; j < c; j++) sum[j] += wide[i + (size_t)j];
}
typedef struct ckca__batchnorm_sums {
    const ckca_context *ctx;
    size_t rows, block, cols; /* total rows; rows per block; values in a row of wide sums */
    int c;
    const float *x;
    float *part; /* sums per block */
} ckca__batchnorm_sums;
static void ckca__batchnorm_moments(void *job, int b, int thread) {
    const ckca__batchnorm_sums *a = (const ckca__batchnorm_sums *)job;
    size_t c = (size_t)a->c, first = (size_t)b * a->block, cols = a->cols;
    size_t count = a->rows - first < a->block ? a->rows - first : a->block, i;
    size_t sample = (count < 16 ? count : 16) * c;
    const float *from = a->x + first * c;
    float *shift = a->part + (size_t)b * 3 * c, *sum = shift + c, *square = sum + c, wide[3 * CKCA__TABLE_WIDTH];
    (void)thread;
    ckca__fold_sums(sample, a->c, from, shift);
    for (i = 0; i < c; i++) shift[i] *= (float)a->c / (float)sample;
    if (cols > c) {
        ckca__broadcast_row(cols, a->c, shift, wide);
        shift = wide;
        sum = wide + CKCA__TABLE_WIDTH;
        square = sum + CKCA__TABLE_WIDTH;
    }
    memset(sum, 0, cols * sizeof *sum);
    memset(square, 0, cols * sizeof *square);
    CKCA__DISPATCH(a->ctx, ckca__moments, (count * c, cols, from, shift, sum, square));
    if (cols > c) {
        float *part = a->part + (size_t)b * 3 * c;
        ckca__fold_sums(cols, a->c, sum, part + c);
        ckca__fold_sums(cols, a->c, square, part + 2 * c);
    }
}
/* mean and inv_std in one pass over x. Squares are taken of differences from a shift, the mean of the block's first 16
   rows, so that a mean far from 0 loses no precision; blocks are combined as in Chan, Golub, LeVeque 1979. */
static void ckca__batchnorm_statistics(ckca_context *ctx, size_t rows, int c, const float *x, float *running_mean,
                                       float *running_var, float *mean, float *inv_std, void *ws) {
    size_t block = ckca__block_rows(ctx, rows, c);
    double *total = (double *)ws, *square = total + c;
    float *part = (float *)(square + c); /* per block: c shifts, c sums, c sums of squares */
    ckca__batchnorm_sums job = {ctx, rows, block, ckca__fused_rows(ctx, c) * (size_t)c, c, x, part};
    int blocks = (int)((rows + block - 1) / block), b, j;
    ckca__parallel_over(ctx, rows * (size_t)c, blocks, ckca__batchnorm_moments, &job);
    memset(total, 0, 2 * (size_t)c * sizeof *total);
    for (b = 0; b < blocks; b++) {
        size_t first = (size_t)b * block;
        double n = (double)(rows - first < block ? rows - first : block);
        const float *shift = part + (size_t)b * 3 * (size_t)c, *sum = shift + c;
        for (j = 0; j < c; j++) total[j] += n * shift[j] + sum[j];
    }
    for (j = 0; j < c; j++) total[j] /= (double)rows;
    for (b = 0; b < blocks; b++) {
        size_t first = (size_t)b * block;
        double n = (double)(rows - first < block ? rows - first : block), inv_n = 1 / n;
        const float *shift = part + (size_t)b * 3 * (size_t)c, *sum = shift + c;
        for (j = 0; j < c; j++) {
            double d = sum[j] * inv_n, e = shift[j] + d - total[j];
            square[j] += sum[c + j] - n * d * d + n * e * e;
        }
    }
    for (j = 0; j < c; j++) {
        double var = square[j] / (double)rows;
        ckca__batchnorm_finish(rows, total[j], var < 0 ? 0 : var, running_mean + j, running_var + j, mean + j,
                               inv_std + j);
    }
}
typedef struct ckca__batchnorm_table {
    const ckca_context *ctx;
    size_t rows, block, cols; /* total rows; rows per block; values in a row of the tables */
    int c, blocks, at, width; /* number of blocks; the strip's first channel and number of channels */
    const float *x, *residual;
    float *y;
    ckca__norm_table table, residual_table; /* residual_table.mean is NULL if the residual has no norm */
    float values[6][CKCA__TABLE_WIDTH];
} ckca__batchnorm_table;
static void ckca__batchnorm_apply_block(void *job, int b, int thread) {
    const ckca__batchnorm_table *a = (const ckca__batchnorm_table *)job;
    size_t i = (size_t)b * a->block, end = a->rows - i < a->block ? a->rows : i + a->block;
    size_t step = a->width == a->c ? end - i : 1;
    (void)thread;
    for (; i < end; i += step) {
        size_t from = i * (size_t)a->c + (size_t)a->at;
        CKCA__DISPATCH(a->ctx, ckca__normalize,
                       (step * (size_t)a->width, a->cols, a->x + from, &a->table,
                        a->residual ? a->residual + from : NULL, a->residual_table.mean ? &a->residual_table : NULL,
                        a->y + from));
    }
}
/* Fills the table of a norm's channels [at, at + width), repeated to cols values. inv_std NULL: computed from var. */
static void ckca__norm_table_fill(const ckca__norm *norm, const float *var, int at, int width, size_t cols,
                                  float values[3][CKCA__TABLE_WIDTH], ckca__norm_table *table) {
    int j;
    for (j = 0; j < width; j++)
        values[1][j] = norm->gamma[at + j] *
                       (norm->inv_std ? norm->inv_std[at + j] : (float)(1 / sqrt(var[at + j] + CKCA__BATCHNORM_EPS)));
    ckca__broadcast_row(cols, width, norm->mean + at, values[0]);
    ckca__broadcast_row(cols, width, values[1], values[1]);
    ckca__broadcast_row(cols, width, norm->beta + at, values[2]);
    table->mean = values[0];
    table->scale = values[1];
    table->beta = values[2];
    table->relu = norm->relu;
}
/* y = relu?(norm(x) + residual). */
static void ckca__batchnorm_apply(ckca_context *ctx, size_t rows, int c, const float *x, const ckca__norm *norm,
                                  const float *var, const float *residual, const ckca__norm *residual_norm, float *y) {
    ckca__batchnorm_table job;
    int at;
    job.ctx = ctx;
    job.rows = rows;
    job.block = ckca__block_rows(ctx, rows, c);
    job.c = c;
    job.blocks = (int)((rows + job.block - 1) / job.block);
    job.x = x;
    job.residual = residual;
    job.y = y;
    job.residual_table.mean = NULL;
    for (at = 0; at < c; at += CKCA__TABLE_WIDTH) { /* strips, if there are more channels than the tables hold */
        int width = c - at < CKCA__TABLE_WIDTH ? c - at : CKCA__TABLE_WIDTH;
        job.at = at;
        job.width = width;
        job.cols = width == c ? ckca__fused_rows(ctx, c) * (size_t)c : (size_t)width;
        ckca__norm_table_fill(norm, var, at, width, job.cols, job.values, &job.table);
        if (residual_norm)
            ckca__norm_table_fill(residual_norm, NULL, at, width, job.cols, job.values + 3, &job.residual_table);
        ckca__parallel_over_reverse(ctx, rows * (size_t)c, job.blocks, ckca__batchnorm_apply_block, &job);
    }
}
typedef struct ckca__batchnorm_gradient {
    const ckca_context *ctx;
    size_t rows, block, cols; /* total rows; rows per block; values in a row of the tables */
    int c, blocks;
    const float *x, *y, *dy;
    const float *mean, *scale, *beta, *slope, *offset; /* tables: see ckca__normalize_backward. beta may be NULL */
    float *part, *dx, *dresidual;
    int accumulate_residual;
} ckca__batchnorm_gradient;
/* One block's sums of g and of g (x - mean). */
static void ckca__batchnorm_products(void *job, int b, int thread) {
    const ckca__batchnorm_gradient *a = (const ckca__batchnorm_gradient *)job;
    size_t c = (size_t)a->c, cols = a->cols, first = (size_t)b * a->block, from = first * c;
    size_t count = a->rows - first < a->block ? a->rows - first : a->block;
    float *part = a->part + (size_t)b * 2 * c, wide[2 * CKCA__TABLE_WIDTH];
    float *sum = cols > c ? wide : part, *product = cols > c ? wide + CKCA__TABLE_WIDTH : part + c;
    (void)thread;
    memset(sum, 0, cols * sizeof *sum);
    memset(product, 0, cols * sizeof *product);
    CKCA__DISPATCH(a->ctx, ckca__products,
                   (count * c, cols, a->x + from, a->y ? a->y + from : NULL, a->dy + from, a->mean,
                    a->beta ? a->scale : NULL, a->beta, sum, product));
    if (cols > c) {
        ckca__fold_sums(cols, a->c, sum, part);
        ckca__fold_sums(cols, a->c, product, part + c);
    }
}
static void ckca__batchnorm_backward_block(void *job, int b, int thread) {
    const ckca__batchnorm_gradient *a = (const ckca__batchnorm_gradient *)job;
    size_t first = (size_t)b * a->block, from = first * (size_t)a->c;
    size_t count = a->rows - first < a->block ? a->rows - first : a->block;
    (void)thread;
    CKCA__DISPATCH(a->ctx, ckca__normalize_backward,
                   (count * (size_t)a->c, a->cols, a->x + from, a->y ? a->y + from : NULL, a->dy + from, a->mean,
                    a->scale, a->slope, a->offset, a->beta, a->dx + from, a->dresidual ? a->dresidual + from : NULL,
                    a->accumulate_residual));
}
#endif

/* Memory traffic: 1 read for the statistics; if y is written, 1 read and 1 write to apply them and 1 read of the
   residual. */
static void ckca__op_batchnorm_forward(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                       const float *gamma, const float *beta, float *running_mean, float *running_var,
                                       const float *residual, const ckca__norm *residual_norm, int relu, float *y,
                                       float *mean, float *inv_std, void *ws) {
    (void)bf16;
#ifdef CKCA__SIMD
    if (ctx->isa != CKCA_ISA_PLAIN) {
        const ckca__norm norm = {mean, inv_std, gamma, beta, relu};
        ckca__batchnorm_statistics(ctx, rows, c, x, running_mean, running_var, mean, inv_std, ws);
        if (y) ckca__batchnorm_apply(ctx, rows, c, x, &norm, NULL, residual, residual_norm, y);
        return;
    }
#endif
    (void)ctx;
    ckca__naive_batchnorm_forward(rows, c, x, gamma, beta, running_mean, running_var, residual, residual_norm, relu, y,
                                  mean, inv_std, ws);
}

/* Memory traffic: 1 read of x, 1 of the residual, 1 write. */
static void ckca__op_batchnorm_recompute(ckca_context *ctx, int bf16, size_t rows, int c, const float *x,
                                         const ckca__norm *norm, const float *residual, const ckca__norm *residual_norm,
                                         float *y) {
    (void)bf16;
#ifdef CKCA__SIMD
    if (ctx->isa != CKCA_ISA_PLAIN) {
        ckca__batchnorm_apply(ctx, rows, c, x, norm, NULL, residual, residual_norm, y);
        return;
    }
#endif
    (void)ctx;
    ckca__naive_batchnorm_apply(rows, c, x, norm, residual, residual_norm, y);
}

/* Memory traffic: 2 reads (x, dy) for the sums; 2 reads and 1 write for dx; y, if given, is read in both passes;
   dresidual takes 1 write, and 1 read if it accumulates. */
static void ckca__op_batchnorm_backward(ckca_context *ctx, int bf16, size_t rows, int c, const float *x, const float *y,
                                        const float *dy, const ckca__norm *norm, float *dx, float *dresidual,
                                        int accumulate_residual, float *dgamma, float *dbeta, void *ws) {
    (void)bf16;
#ifdef CKCA__SIMD
    if (ctx->isa != CKCA_ISA_PLAIN) {
        const float *gamma = norm->gamma, *inv_std = norm->inv_std;
        size_t block = ckca__block_rows(ctx, rows, c), cols = ckca__fused_rows(ctx, c) * (size_t)c;
        double *sum = (double *)ws, *product = sum + c;
        float *table = (float *)(product + c), *part = table + 5 * cols; /* mean, scale, beta, slope, offset */
        int blocks = (int)((rows + block - 1) / block), b, j;
        ckca__batchnorm_gradient job = {ctx,
                                        rows,
                                        block,
                                        cols,
                                        c,
                                        blocks,
                                        x,
                                        norm->relu ? y : NULL,
                                        dy,
                                        table,
                                        table + cols,
                                        norm->relu && !y ? table + 2 * cols : NULL,
                                        table + 3 * cols,
                                        table + 4 * cols,
                                        part,
                                        dx,
                                        dresidual,
                                        accumulate_residual};
        for (j = 0; j < c; j++) {
            table[j] = norm->mean[j];
            table[cols + (size_t)j] = gamma[j] * inv_std[j];
            table[2 * cols + (size_t)j] = norm->beta[j];
        }
        for (j = 0; j < 3; j++) ckca__broadcast_row(cols, c, table + (size_t)j * cols, table + (size_t)j * cols);
        if (dgamma) ckca__parallel_over(ctx, rows * (size_t)c, blocks, ckca__batchnorm_products, &job);
        memset(sum, 0, 2 * (size_t)c * sizeof *sum);
        for (b = 0; dgamma && b < blocks; b++)
            for (j = 0; j < 2 * c; j++) sum[j] += part[(size_t)b * 2 * (size_t)c + (size_t)j];
        for (j = 0; j < c; j++) {
            double xhat_g = product[j] * inv_std[j], scale = (double)gamma[j] * inv_std[j];
            if (dgamma) dbeta[j] += (float)sum[j], dgamma[j] += (float)xhat_g;
            table[3 * cols + (size_t)j] = (float)(scale * inv_std[j] * xhat_g / (double)rows);
            table[4 * cols + (size_t)j] = (float)(scale * sum[j] / (double)rows);
        }
        for (j = 3; j < 5; j++) ckca__broadcast_row(cols, c, table + (size_t)j * cols, table + (size_t)j * cols);
        ckca__parallel_over_reverse(ctx, rows * (size_t)c, blocks, ckca__batchnorm_backward_block, &job);
        return;
    }
#endif
    (void)ctx;
    ckca__naive_batchnorm_backward(rows, c, x, y, dy, norm, dx, dresidual, accumulate_residual, dgamma, dbeta, ws);
}

static void ckca__op_batchnorm_eval(ckca_context *ctx, int bf16, size_t rows, int c, const float *x, const float *gamma,
                                    const float *beta, const float *running_mean, const float *running_var,
                                    const float *residual, int relu, float *y) {
    (void)bf16;
#ifdef CKCA__SIMD
    if (ctx->isa != CKCA_ISA_PLAIN) {
        const ckca__norm norm = {running_mean, NULL, gamma, beta, relu};
        ckca__batchnorm_apply(ctx, rows, c, x, &norm, running_var, residual, NULL, y);
        return;
    }
#endif
    (void)ctx;
    ckca__naive_batchnorm_eval(rows, c, x, gamma, beta, running_mean, running_var, residual, relu, y);
}

static void ckca__op_fold(ckca_context *ctx, int k, size_t per, const float *w, const float *bias, const float *gamma,
                          const float *beta, const float *running_mean, const float *running_var, float *w_out,
                          float *bias_out) {
    size_t j;
    int i;
    (void)ctx;
    for (i = 0; i < k; i++) {
        double scale = gamma[i] / sqrt(running_var[i] + CKCA__BATCHNORM_EPS);
        for (j = 0; j < per; j++) w_out[(size_t)i * per + j] = (float)(w[(size_t)i * per + j] * scale);
        bias_out[i] = (float)(beta[i] + ((bias ? bias[i] : 0) - running_mean[i]) * scale);
    }
}

/* ---- group norm ---- */

/* Plain loops, which are their own reference; a task is a picture. */
typedef struct ckca__groupnorm {
    int n, area, c, groups, accumulate;
    const float *x, *gamma, *beta, *dy;
    float *y, *dx;
    float *statistics; /* n x groups means, then inv_std; or NULL */
    float *parts;      /* n x 2 x c: each picture's part of dgamma, then of dbeta */
} ckca__groupnorm;

static void ckca__groupnorm_picture(void *job, int n, int thread) {
    const ckca__groupnorm *a = (const ckca__groupnorm *)job;
    const size_t c = (size_t)a->c, size = (size_t)a->area * c, per = c / (size_t)a->groups, groups = (size_t)a->groups;
    const float *x = a->x + (size_t)n * size;
    float *y = a->y + (size_t)n * size;
    size_t g, i, j;
    (void)thread;
    for (g = 0; g < groups; g++) {
        const double count = (double)a->area * (double)per;
        double sum = 0, square = 0;
        float mean, inv_std;
        for (i = g * per; i < size; i += c)
            for (j = i; j < i + per; j++) sum += (double)x[j];
        sum /= count;
        for (i = g * per; i < size; i += c)
            for (j = i; j < i + per; j++) square += ((double)x[j] - sum) * ((double)x[j] - sum);
        mean = (float)sum;
        inv_std = (float)(1 / sqrt(square / count + CKCA__BATCHNORM_EPS));
        for (i = g * per; i < size; i += c)
            for (j = 0; j < per; j++)
                y[i + j] = (x[i + j] - mean) * (inv_std * a->gamma[g * per + j]) + a->beta[g * per + j];
        if (!a->statistics) continue;
        a->statistics[(size_t)n * groups + g] = mean;
        a->statistics[((size_t)a->n + (size_t)n) * groups + g] = inv_std;
    }
}

/* With xhat = (x - mean) inv_std, per channel dgamma = sum dy xhat, dbeta = sum dy, and per group of m values
   dx = inv_std (dy gamma - (sum dbeta gamma) / m - xhat (sum dgamma gamma) / m), the sums over its channels. */
static void ckca__groupnorm_backward_picture(void *job, int n, int thread) {
    const ckca__groupnorm *a = (const ckca__groupnorm *)job;
    const size_t c = (size_t)a->c, size = (size_t)a->area * c, per = c / (size_t)a->groups, groups = (size_t)a->groups;
    const float *x = a->x + (size_t)n * size, *dy = a->dy + (size_t)n * size;
    float *dx = a->dx ? a->dx + (size_t)n * size : NULL, *dgamma = a->parts + 2 * c * (size_t)n, *dbeta = dgamma + c;
    size_t g, i, j;
    (void)thread;
    for (g = 0; g < groups; g++) {
        const float mean = a->statistics[(size_t)n * groups + g];
        const float inv_std = a->statistics[((size_t)a->n + (size_t)n) * groups + g];
        const double count = (double)a->area * (double)per;
        double sum = 0, product = 0;
        float slope, shift;
        for (j = g * per; j < (g + 1) * per; j++) {
            double of_dy = 0, of_product = 0;
            for (i = j; i < size; i += c) {
                of_dy += (double)dy[i];
                of_product += (double)dy[i] * (double)((x[i] - mean) * inv_std);
            }
            dbeta[j] = (float)of_dy;
            dgamma[j] = (float)of_product;
            sum += of_dy * (double)a->gamma[j];
            product += of_product * (double)a->gamma[j];
        }
        shift = (float)(sum / count);
        slope = (float)(product / count);
        for (i = g * per; dx && i < size; i += c)
            for (j = 0; j < per; j++) {
                const float xhat = (x[i + j] - mean) * inv_std;
                const float d = inv_std * (dy[i + j] * a->gamma[g * per + j] - shift - xhat * slope);
                dx[i + j] = a->accumulate ? dx[i + j] + d : d;
            }
    }
}

static void ckca__op_groupnorm_forward(ckca_context *ctx, int bf16, int n, int area, int c, int groups, const float *x,
                                       const float *gamma, const float *beta, float *y, float *statistics) {
    ckca__groupnorm job = {n, area, c, groups, 0, x, gamma, beta, NULL, y, NULL, statistics, NULL};
    (void)bf16;
    ckca__parallel_over(ctx, (size_t)n * (size_t)area * (size_t)c, n, ckca__groupnorm_picture, &job);
}

static void ckca__op_groupnorm_backward(ckca_context *ctx, int bf16, int n, int area, int c, int groups, const float *x,
                                        const float *gamma, const float *statistics, const float *dy, float *dx,
                                        int accumulate, float *dgamma, float *dbeta, void *ws) {
    ckca__groupnorm job = {
        n, area, c, groups, accumulate, x, gamma, NULL, dy, NULL, dx, (float *)(uintptr_t)statistics, (float *)ws};
    const float *part = job.parts;
    int i, j;
    (void)bf16;
    ckca__parallel_over(ctx, (size_t)n * (size_t)area * (size_t)c, n, ckca__groupnorm_backward_picture, &job);
    for (i = 0; dgamma && i < n; i++, part += 2 * c)
        for (j = 0; j < c; j++) dgamma[j] += part[j], dbeta[j] += part[c + j];
}

/* ---- element-wise ---- */

#ifdef CKCA__SIMD
typedef struct ckca__add_job {
    const ckca_context *ctx;
    size_t count;
    const float *a, *b;
    int relu;
    float *y;
} ckca__add_job;
static void ckca__add_block(void *job, int i, int thread) {
    const ckca__add_job *o = (const ckca__add_job *)job;
    size_t from = (size_t)i * CKCA__BLOCK;
    (void)thread;
    CKCA__DISPATCH(o->ctx, ckca__add,
                   (ckca__block_size(o->count, i), o->a + from, o->b ? o->b + from : NULL, o->relu, o->y + from));
}
typedef struct ckca__add_gradient {
    const ckca_context *ctx;
    size_t count;
    const float *y, *dy;
    float *dx;
    int accumulate;
} ckca__add_gradient;
static void ckca__add_backward_block(void *job, int i, int thread) {
    const ckca__add_gradient *a = (const ckca__add_gradient *)job;
    size_t from = (size_t)i * CKCA__BLOCK;
    (void)thread;
    CKCA__DISPATCH(
        a->ctx, ckca__add_backward,
        (ckca__block_size(a->count, i), a->y ? a->y + from : NULL, a->dy + from, a->dx + from, a->accumulate));
}
#endif

static void ckca__op_add(ckca_context *ctx, int bf16, size_t count, const float *a, const float *b, int relu,
                         float *y) {
    (void)bf16;
#ifdef CKCA__SIMD
    if (ctx->isa != CKCA_ISA_PLAIN) {
        ckca__add_job job = {ctx, count, a, b, relu, y};
        ckca__parallel_over(ctx, count, ckca__blocks(count), ckca__add_block, &job);
        return;
    }
#endif
    (void)ctx;
    ckca__naive_add(count, a, b, relu, y);
}

static void ckca__op_add_backward(ckca_context *ctx, int bf16, size_t count, const float *y, const float *dy, float *dx,
                                  int accumulate) {
    (void)bf16;
#ifdef CKCA__SIMD
    if (ctx->isa != CKCA_ISA_PLAIN) {
        ckca__add_gradient job = {ctx, count, y, dy, dx, accumulate};
        ckca__parallel_over(ctx, count, ckca__blocks(count), ckca__add_backward_block, &job);
        return;
    }
#endif
    (void)ctx;
    ckca__naive_add_backward(count, y, dy, dx, accumulate);
}

/* ---- pooling ---- */

typedef struct ckca__maxpool {
    const ckca_context *ctx;
    const ckca__conv *s;
    const float *x;
    float *y;
    unsigned char *at;
} ckca__maxpool;

/* One row of the output: n p independent rows. */
static void ckca__maxpool_row(void *job, int row, int thread) {
    const ckca__maxpool *a = (const ckca__maxpool *)job;
    const ckca__conv *s = a->s;
    const float *from[CKCA__TAPS];
    unsigned char position[CKCA__TAPS];
    int h0 = row % s->p * s->stride - s->pad, q, i, j;
    (void)thread;
    for (q = 0; q < s->q; q++) {
        ptrdiff_t o = ((ptrdiff_t)row * s->q + q) * s->c;
        int w0 = q * s->stride - s->pad, taps = 0;
        for (i = h0 < 0 ? -h0 : 0; i < s->r && h0 + i < s->h; i++)
            for (j = w0 < 0 ? -w0 : 0; j < s->s && w0 + j < s->w; j++) {
                from[taps] = a->x + (((ptrdiff_t)(row / s->p) * s->h + h0 + i) * s->w + w0 + j) * s->c;
                position[taps++] = (unsigned char)(i * s->s + j);
            }
#ifdef CKCA__SIMD
        if (a->ctx->isa != CKCA_ISA_PLAIN) {
            CKCA__DISPATCH(a->ctx, ckca__maxpool_pixel,
                           (s->c, taps, from, s->norm, position, a->y + o, a->at ? a->at + o : NULL));
            continue;
        }
#endif
        ckca__naive_maxpool_pixel(s->c, taps, from, position, a->y + o, a->at ? a->at + o : NULL);
    }
}

static void ckca__op_maxpool_forward(ckca_context *ctx, const ckca__conv *s, const float *x, float *y,
                                     unsigned char *at) {
    ckca__maxpool job = {ctx, s, x, y, at};
    ckca__parallel_over(ctx, ckca__map_size(s->n, s->p, s->q, s->c), s->n * s->p, ckca__maxpool_row, &job);
}

typedef struct ckca__maxpool_gradient {
    const ckca_context *ctx;
    const ckca__conv *s;
    const float *dy;
    const unsigned char *at;
    float *dx;
    int accumulate;
} ckca__maxpool_gradient;

/* One row of the input: n h of them. A gather: each pixel collects from the few windows that cover it, so pixels are
   independent. */
static void ckca__maxpool_backward_row(void *job, int row, int thread) {
    const ckca__maxpool_gradient *a = (const ckca__maxpool_gradient *)job;
    const ckca__conv *s = a->s;
    ptrdiff_t from[CKCA__TAPS];
    unsigned char position[CKCA__TAPS];
    int h = row % s->h + s->pad, w, p, q; /* row in the padded input, where window p starts at p stride */
    int p0 = h < s->r ? 0 : (h - s->r) / s->stride + 1, p1 = h / s->stride < s->p ? h / s->stride : s->p - 1;
    (void)thread;
    for (w = s->pad; w < s->w + s->pad; w++) {
        int q0 = w < s->s ? 0 : (w - s->s) / s->stride + 1, q1 = w / s->stride < s->q ? w / s->stride : s->q - 1;
        float *to = a->dx + ((ptrdiff_t)row * s->w + w - s->pad) * s->c;
        int taps = 0;
        for (p = p0; p <= p1; p++)
            for (q = q0; q <= q1; q++) {
                from[taps] = (((ptrdiff_t)(row / s->h) * s->p + p) * s->q + q) * s->c;
                position[taps++] = (unsigned char)((h - p * s->stride) * s->s + w - q * s->stride);
            }
#ifdef CKCA__SIMD
        if (a->ctx->isa != CKCA_ISA_PLAIN) {
            CKCA__DISPATCH(a->ctx, ckca__maxpool_pixel_backward,
                           (s->c, taps, from, position, a->dy, a->at, to, a->accumulate));
            continue;
        }
#endif
        ckca__naive_maxpool_pixel_backward(s->c, taps, from, position, a->dy, a->at, to, a->accumulate);
    }
}

static void ckca__op_maxpool_backward(ckca_context *ctx, const ckca__conv *s, const float *dy, const unsigned char *at,
                                      float *dx, int accumulate) {
    ckca__maxpool_gradient job = {ctx, s, dy, at, dx, accumulate};
    ckca__parallel_over(ctx, ckca__map_size(s->n, s->h, s->w, s->c), s->n * s->h, ckca__maxpool_backward_row, &job);
}

static void ckca__op_avgpool_forward(ckca_context *ctx, int bf16, int n, int area, int c, const float *x, float *y) {
    ckca__avgpool job = {area, c, x, y, 0};
    (void)bf16;
    ckca__parallel_over(ctx, (size_t)n * (size_t)area * (size_t)c, n, ckca__avgpool_picture, &job);
}

static void ckca__op_avgpool_backward(ckca_context *ctx, int bf16, int n, int area, int c, const float *dy, float *dx,
                                      int accumulate) {
    ckca__avgpool job = {area, c, dy, dx, accumulate};
    (void)bf16;
    ckca__parallel_over(ctx, (size_t)n * (size_t)area * (size_t)c, n, ckca__avgpool_backward_picture, &job);
}

static void ckca__op_subsample_forward(ckca_context *ctx, const ckca__conv *s, const float *x, float *y) {
    ckca__subsample job = {s, x, y, 0};
    ckca__parallel_over(ctx, ckca__map_size(s->n, s->p, s->q, s->k), s->n, ckca__subsample_picture, &job);
}

static void ckca__op_subsample_backward(ckca_context *ctx, const ckca__conv *s, const float *dy, float *dx,
                                        int accumulate) {
    ckca__subsample job = {s, dy, dx, accumulate};
    ckca__parallel_over(ctx, ckca__map_size(s->n, s->h, s->w, s->c), s->n, ckca__subsample_backward_picture, &job);
}

/* ---- losses ----

   Exponentials and sums are in double precision, since the terms are differences of nearly equal numbers when student
   and teacher agree; n x k is so small that one thread suffices. */

/* log sum_j exp(z_j / t), with the maximum subtracted so that nothing overflows. NaN or +inf in z gives NaN. */
static double ckca__log_sum_exp(int k, const float *logits, double t) {
    double max = logits[0], sum = 0;
    int j;
    for (j = 1; j < k; j++)
        if (logits[j] > max) max = logits[j];
    if (max != max) return max;
    for (j = 0; j < k; j++) sum += exp((logits[j] - max) / t);
    return max / t + log(sum);
}

static void ckca__op_cross_entropy(ckca_context *ctx, int n, int k, const float *logits, const int *labels,
                                   float smoothing, float scale, float *dlogits, float *loss, int *hit) {
    int i;
    (void)ctx;
    for (i = 0; i < n; i++) {
        const float *row = logits + (size_t)i * (size_t)k;
        double lse = ckca__log_sum_exp(k, row, 1), sum = 0;
        int label = labels[i], rank = 0, j;
        for (j = 0; j < k; j++) {
            sum += row[j];
            rank += row[j] > row[label] || (row[j] == row[label] && j < label);
            if (dlogits)
                dlogits[(ptrdiff_t)i * k + j] =
                    (float)(scale *
                            ((exp(row[j] - lse) - (j == label ? 1 - smoothing : 0) - smoothing / (float)k) / n));
        }
        loss[i] = (float)(lse - (1 - smoothing) * row[label] - smoothing * (sum / k));
        hit[i] = lse == lse ? (rank == 0) | (rank < 5) << 1 : 0;
    }
}

static void ckca__op_softmax(ckca_context *ctx, int n, int k, const float *logits, float *p) {
    int i;
    (void)ctx;
    for (i = 0; i < n; i++) {
        const float *row = logits + (size_t)i * (size_t)k;
        double lse = ckca__log_sum_exp(k, row, 1);
        int j;
        for (j = 0; j < k; j++) p[(ptrdiff_t)i * k + j] = (float)exp(row[j] - lse);
    }
}

/* T^2 a_i KL(softmax(teacher_i / T) || softmax(student_i / T)); its gradient with respect to student_i is T a_i
   (softmax(student_i / T) - softmax(teacher_i / T)). T^2 makes the gradient's scale independent of T (Hinton, Vinyals,
   Dean 2015, section 2); a_i is this project's. */
static void ckca__op_adakd(ckca_context *ctx, int n, int k, const float *student_logits, const float *teacher_logits,
                           const int *labels, const float *class_weight, float temperature, float scale, float *dlogits,
                           float *loss) {
    double t = temperature;
    int i;
    (void)ctx;
    for (i = 0; i < n; i++) {
        const float *s = student_logits + (size_t)i * (size_t)k, *o = teacher_logits + (size_t)i * (size_t)k;
        double lse_s = ckca__log_sum_exp(k, s, t), lse_o = ckca__log_sum_exp(k, o, t), kl = 0;
        double a = class_weight ? class_weight[labels[i]] : 1;
        int j;
        for (j = 0; j < k; j++) {
            double log_s = s[j] / t - lse_s, log_o = o[j] / t - lse_o, p_o = exp(log_o);
            kl += p_o * (log_o - log_s);
            dlogits[(ptrdiff_t)i * k + j] += (float)(scale * t * a * (exp(log_s) - p_o) / n);
        }
        loss[i] = (float)(t * t * a * kl);
    }
}

/* a . b */
static double ckca__naive_dot(size_t count, const float *a, const float *b) {
    double sum = 0;
    size_t j;
    for (j = 0; j < count; j++) sum += (double)a[j] * b[j];
    return sum;
}
static double ckca__vector_dot(const ckca_context *ctx, size_t count, const float *a, const float *b) {
#ifdef CKCA__SIMD
    double sum;
    if (ctx->isa != CKCA_ISA_PLAIN) {
        CKCA__DISPATCH(ctx, sum = ckca__dot, (count, a, b));
        return sum;
    }
#endif
    (void)ctx;
    return ckca__naive_dot(count, a, b);
}
/* y (+)= alpha a + beta b. */
static void ckca__naive_combine(size_t count, float alpha, const float *a, float beta, const float *b, float *y,
                                int accumulate) {
    size_t j;
    for (j = 0; j < count; j++) y[j] = alpha * a[j] + beta * b[j] + (accumulate ? y[j] : 0);
}
static void ckca__vector_combine(const ckca_context *ctx, size_t count, float alpha, const float *a, float beta,
                                 const float *b, float *y, int accumulate) {
#ifdef CKCA__SIMD
    if (ctx->isa != CKCA_ISA_PLAIN) {
        CKCA__DISPATCH(ctx, ckca__combine, (count, alpha, a, beta, b, y, accumulate));
        return;
    }
#endif
    (void)ctx;
    ckca__naive_combine(count, alpha, a, beta, b, y, accumulate);
}

static double ckca__inverse_norm(double square) { return square > 0 ? 1 / sqrt(square) : square; /* 0, NaN */ }

typedef struct ckca__featreg {
    const ckca_context *ctx;
    int n, d;
    const float *student_features, *teacher_features;
    float scale;
    float *dfeatures;
    int accumulate;
    float of_zero;
    float *loss;
} ckca__featreg;

/* One row: loss = 1 - cos; d cos / d f = (fo / |fo| - cos f / |f|) / |f|, with f the student's and fo the teacher's
   features. A long row, such as a whole map, is read from memory by the first product and from cache by the others. */
static void ckca__featreg_row(void *job, int i, int thread) {
    const ckca__featreg *a = (const ckca__featreg *)job;
    const ckca_context *ctx = a->ctx;
    const size_t d = (size_t)a->d, row = (size_t)i * d;
    const float *student_features = a->student_features + row, *teacher_features = a->teacher_features + row;
    const double scale = (double)a->scale / a->n;
    double inv_f = ckca__inverse_norm(ckca__vector_dot(ctx, d, student_features, student_features));
    double inv_o = ckca__inverse_norm(ckca__vector_dot(ctx, d, teacher_features, teacher_features));
    double cosine = ckca__vector_dot(ctx, d, student_features, teacher_features) * inv_f * inv_o;
    (void)thread;
    a->loss[i] = inv_o == 0 ? a->of_zero : (float)(1 - cosine);
    ckca__vector_combine(ctx, d, (float)(scale * cosine * inv_f * inv_f), student_features,
                         (float)(-scale * inv_f * inv_o), teacher_features, a->dfeatures + row, a->accumulate);
}

static void ckca__op_featreg(ckca_context *ctx, int bf16, int bf16_teacher, int n, int d, const float *student_features,
                             const float *teacher_features, float scale, float *dfeatures, int accumulate,
                             float of_zero, float *loss) {
    ckca__featreg job = {ctx, n, d, student_features, teacher_features, scale, dfeatures, accumulate, of_zero, loss};
    (void)bf16;
    (void)bf16_teacher;
    ckca__parallel_over(ctx, (size_t)n * (size_t)d, n, ckca__featreg_row, &job);
}

static void ckca__op_sum(ckca_context *ctx, int n, const float *values, double *sum) {
    int i;
    (void)ctx;
    for (i = 0; i < n; i++) *sum += values[i];
}

static void ckca__op_count(ckca_context *ctx, int n, const int *hit, double *sum) {
    int i;
    (void)ctx;
    for (i = 0; i < n; i++) *sum += hit[i] & 1;
}

/* ---- weights ---- */

#ifdef CKCA__SIMD
typedef struct ckca__sgd_job {
    const ckca_context *ctx;
    size_t count;
    float *w;
    const float *g;
    float *v;
    float lr, momentum, weight_decay;
    int nesterov;
    float scale;
} ckca__sgd_job;
static void ckca__sgd_block(void *job, int i, int thread) {
    const ckca__sgd_job *a = (const ckca__sgd_job *)job;
    size_t from = (size_t)i * CKCA__BLOCK;
    (void)thread;
    CKCA__DISPATCH(a->ctx, ckca__sgd,
                   (ckca__block_size(a->count, i), a->w + from, a->g + from, a->v + from, a->lr, a->momentum,
                    a->weight_decay, a->nesterov, a->scale));
}
#endif

static void ckca__sgd_part(ckca_context *ctx, size_t count, float *w, const float *g, float *v, float lr,
                           float momentum, float weight_decay, int nesterov, float gscale) {
#ifdef CKCA__SIMD
    if (ctx->isa != CKCA_ISA_PLAIN) {
        ckca__sgd_job job = {ctx, count, w, g, v, lr, momentum, weight_decay, nesterov, gscale};
        ckca__parallel_over(ctx, count, ckca__blocks(count), ckca__sgd_block, &job);
        return;
    }
#endif
    (void)ctx;
    ckca__naive_sgd(count, w, g, v, lr, momentum, weight_decay, nesterov, gscale);
}

static void ckca__op_sgd(ckca_context *ctx, size_t count, size_t decayed, float *w, const float *g, float *v,
                         const float *lr, float factor, float momentum, float weight_decay, int nesterov,
                         const float *gscale) {
    float scale = gscale ? *gscale : 1;
    ckca__sgd_part(ctx, decayed, w, g, v, *lr * factor, momentum, weight_decay, nesterov, scale);
    ckca__sgd_part(ctx, count - decayed, w + decayed, g + decayed, v + decayed, *lr * factor, momentum, 0, nesterov,
                   scale);
}

typedef struct ckca__square_sum {
    const ckca_context *ctx;
    size_t count;
    const float *g;
    double *part; /* CKCA__SUM_BLOCKS */
} ckca__square_sum;

static void ckca__square_sum_block(void *job, int b, int thread) {
    const ckca__square_sum *a = (const ckca__square_sum *)job;
    size_t size = a->count / CKCA__SUM_BLOCKS + 1;
    size_t from = (size_t)b * size, left = from < a->count ? a->count - from : 0;
    (void)thread;
    a->part[b] = left ? ckca__vector_dot(a->ctx, left < size ? left : size, a->g + from, a->g + from) : 0;
}

static void ckca__op_clip(ckca_context *ctx, size_t count, const float *g, float clip, float *gscale, void *ws) {
    double *part = (double *)ws, sum = 0, coefficient;
    ckca__square_sum job = {ctx, count, g, part};
    int b;
    ckca__parallel_over(ctx, count, CKCA__SUM_BLOCKS, ckca__square_sum_block, &job);
    for (b = 0; b < CKCA__SUM_BLOCKS; b++) sum += part[b];
    coefficient = clip / (sqrt(sum) + 1e-6);
    *gscale = coefficient > 1 ? 1 : (float)coefficient;
}

static void ckca__op_gather(ckca_context *ctx, int n, int d, const float *rows, const int *index, float *out) {
    const size_t size = (size_t)d;
    int i;
    (void)ctx;
    for (i = 0; i < n; i++) memcpy(out + (size_t)i * size, rows + (size_t)index[i] * size, size * sizeof *out);
}

static void ckca__op_shrink_perturb(ckca_context *ctx, size_t count, float *w, const float *fresh, float shrink,
                                    float perturb) {
    size_t i;
    (void)ctx;
    for (i = 0; i < count; i++) w[i] = shrink * w[i] + perturb * fresh[i];
}

typedef struct ckca__ewc {
    size_t count;
    const float *w, *old, *fisher;
    float lambda, *g;
    double *part; /* CKCA__SUM_BLOCKS */
} ckca__ewc;

static void ckca__ewc_block(void *job, int b, int thread) {
    const ckca__ewc *a = (const ckca__ewc *)job;
    const size_t size = a->count / CKCA__SUM_BLOCKS + 1;
    size_t i = (size_t)b * size, end = i + size < a->count ? i + size : a->count;
    double sum = 0;
    (void)thread;
    for (; i < end; i++) {
        const float apart = a->w[i] - a->old[i], pull = a->lambda * a->fisher[i] * apart;
        a->g[i] += pull;
        sum += (double)pull * (double)apart;
    }
    a->part[b] = sum / 2;
}

static void ckca__op_ewc(ckca_context *ctx, size_t count, const float *w, const float *old, const float *fisher,
                         float lambda, float *g, double scale, double *sum, void *ws) {
    double *part = (double *)ws, total = 0;
    ckca__ewc job = {count, w, old, fisher, lambda, g, part};
    int b;
    ckca__parallel_over(ctx, count, CKCA__SUM_BLOCKS, ckca__ewc_block, &job);
    for (b = 0; b < CKCA__SUM_BLOCKS; b++) total += part[b];
    *sum += scale * total;
}

static void ckca__op_add_squares(ckca_context *ctx, size_t count, const float *g, float scale, float *fisher) {
    size_t i;
    (void)ctx;
    for (i = 0; i < count; i++) fisher[i] += scale * g[i] * g[i];
}

/* ---- pictures ---- */

/* Crops channels 0 to m - 1 (m <= 4), scaled and shifted. The crop has the picture's size. */
static void ckca__augment_copy_crop(const ckca__framing *f, int h, int w, int c, int m, const unsigned char *pixels,
                                    const float *scale, const float *shift, float *out) {
    int y, x, j;
    for (y = 0; y < h; y++)
        for (x = 0; x < w; x++, out += c) {
            int at_y = f->top + y, at_x = f->left + (f->flip ? w - 1 - x : x);
            int inside = at_y >= 0 && at_y < h && at_x >= 0 && at_x < w;
            const unsigned char *from = pixels + (inside ? ((size_t)at_y * (size_t)w + (size_t)at_x) * (size_t)c : 0);
            for (j = 0; j < m; j++) out[j] = scale[j] * (inside ? from[j] : 0) + shift[j];
        }
}

/* The same with the crop resized to h x w: bilinear between pixel centres, as in torchvision. */
static void ckca__augment_resize_crop(const ckca__framing *f, int h, int w, int c, int m, const unsigned char *pixels,
                                      const float *scale, const float *shift, float *out) {
    int y, x, j;
    for (y = 0; y < h; y++) {
        double v = (y + 0.5) * f->height / h - 0.5, u;
        int y0 = v > 0 ? (int)v : 0;
        float a = v > 0 ? (float)(v - y0) : 0, b;
        const unsigned char *top = pixels + ((size_t)(f->top + y0) * (size_t)w + (size_t)f->left) * (size_t)c;
        const unsigned char *bottom = y0 + 1 < f->height ? top + (size_t)w * (size_t)c : top;
        for (x = 0; x < w; x++, out += c) {
            int x0, x1;
            u = ((f->flip ? w - 1 - x : x) + 0.5) * f->width / w - 0.5;
            x0 = u > 0 ? (int)u : 0;
            b = u > 0 ? (float)(u - x0) : 0;
            x1 = (x0 + 1 < f->width ? x0 + 1 : x0) * c;
            x0 *= c;
            for (j = 0; j < m; j++) {
                float upper = top[x0 + j] + b * (float)(top[x1 + j] - top[x0 + j]);
                float lower = bottom[x0 + j] + b * (float)(bottom[x1 + j] - bottom[x0 + j]);
                out[j] = scale[j] * (upper + a * (lower - upper)) + shift[j];
            }
        }
    }
}

/* torchvision's adjust_brightness, adjust_contrast and adjust_saturation, in this order: blend with black, with the
   picture's mean grey, with each pixel's own grey. */
static void ckca__augment_jitter(const ckca__framing *f, int area, int c, float *v) {
    size_t i, count = (size_t)area * (size_t)c;
    double mean = 0;
    for (i = 0; i < count; i++) v[i] = ckca__augment_clamp(v[i] * f->brightness);
    for (i = 0; i < count; i += (size_t)c) mean += ckca__augment_grey(c, v + i) / (float)area;
    for (i = 0; i < count; i++) v[i] = ckca__augment_clamp(f->contrast * v[i] + (1 - f->contrast) * (float)mean);
    for (i = 0; i < count && c == 3; i += 3) {
        float grey = ckca__augment_grey(c, v + i);
        int j;
        for (j = 0; j < 3; j++)
            v[i + (size_t)j] = ckca__augment_clamp(f->saturation * v[i + (size_t)j] + (1 - f->saturation) * grey);
    }
}

typedef struct ckca__batch {
    int h, w, c;
    const unsigned char *pixels;
    int gathered;
    const int *index;
    const ckca_augment *augment;
    uint64_t seed;
    int epoch;
    const float *mean, *std;
    float *out;
} ckca__batch;

static void ckca__batch_picture(void *job, int i, int thread) {
    const ckca__batch *a = (const ckca__batch *)job;
    const int h = a->h, w = a->w, c = a->c;
    const float *mean = a->mean, *std = a->std;
    size_t size = (size_t)h * (size_t)w * (size_t)c, at;
    const unsigned char *pixels = a->pixels + (size_t)(a->gathered ? i : a->index[i]) * size;
    float *to = a->out + (size_t)i * size;
    ckca__framing f;
    int j, first, jitter = a->augment && a->augment->jitter > 0;
    (void)thread;
    ckca__augment_framing(a->augment, a->seed, a->epoch, a->index[i], h, w, &f);
    for (first = 0; first < c; first += 4) { /* four channels at a time, since there are rarely more */
        int m = c - first < 4 ? c - first : 4;
        float scale[4], shift[4];
        for (j = 0; j < m; j++) {
            scale[j] = jitter ? 1 : 1 / (255 * std[first + j]);
            shift[j] = jitter ? 0 : -mean[first + j] / std[first + j];
        }
        (f.height == h && f.width == w ? ckca__augment_copy_crop : ckca__augment_resize_crop)(
            &f, h, w, c, m, pixels + first, scale, shift, to + first);
    }
    if (!jitter) return;
    ckca__augment_jitter(&f, h * w, c, to);
    for (at = 0; at < size; at += (size_t)c)
        for (j = 0; j < c; j++) to[at + (size_t)j] = (to[at + (size_t)j] / 255 - mean[j]) / std[j];
}

static void ckca__op_batch(ckca_context *ctx, int n, int h, int w, int c, const unsigned char *pixels, int gathered,
                           const int *index, const ckca_augment *augment, uint64_t seed, const int *epoch,
                           const float *mean, const float *std, float *out) {
    ckca__batch job = {h, w, c, pixels, gathered, index, augment, seed, epoch ? *epoch : 0, mean, std, out};
    ckca__parallel_over(ctx, ckca__map_size(n, h, w, c), n, ckca__batch_picture, &job);
}

#endif /* CKCA__HOST_OPS */

#if defined(CKCA__SHARED) && !defined(CKCA__PASS) && !defined(CKCA__POPPED)
#define CKCA__POPPED

#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
#endif

/* ===================================================================================================================
   LICENCE AND HISTORY                                                                                       >>licence

   While the version is 0.x, names of the public API may change; this list says which. Checkpoints of older versions
   stay readable.

   0.2.0    Names: enumerators carry the prefix of their type (CKCA_SCHEDULE_STEP, CKCA_SLOT_VALUE, CKCA_PART_TRAIN,
            CKCA_PRECISION_BF16); layers have one prefix (ckca_layer_conv, ...); ckca_free is ckca_context_free, beside
            ckca_init; ckca_tensors is ckca_tensor_count; the struct ckca_tensor is ckca_tensor_info and its getter
            ckca_tensor_info_get; direct is no_winograd, plain no_nesterov; step of an info or report is updates,
            sgd_steps is steps, step of a progress is update
            Pictures: EXIF orientation, folders below class folders, skip_unreadable, what was left out; our own walk
            over JPEG and PNG decides before stb_image; ckca_read_picture_memory
            Checkpoints: ckca_save_memory, ckca_load_memory, ckca_load_weights_memory; ckca.format; prefixes such as
            "module." are recognised; infinite and NaN weights are refused
            Contracts: a failing call leaves its caller's pointers alone; every descriptor's numbers are checked;
            ckca_update_defaults; a teacher is only read; a training state stays until the result is saved
            Group normalisation (ckca_layer_groupnorm)
            CKCA_METHOD_REPLAY and CKCA_METHOD_EWC, and pictures of earlier chunks for every method: ckca_memory_create
            Method: the defaults are AdaKD's GROWTH and FeatReg's CENTROID, with the number of pictures and the class
            means in the checkpoint; ckca_update_desc.teacher_pictures and unlabelled. Deleted, since no measurement
            supports them: AdaKD's TRUTH and DOUBT, FeatReg's L2 and RELATION
            Never worse: an update of a trained network holds out a fifth of the new pictures and keeps the old network
            unless the new one is better on them (holdout, keep_better, patience; ckca_holdout; CKCA_OFF: as before)
   0.1.0    2026-11-23, the first version: ResNets for CIFAR (8 to 110) and ImageNet (18, 34, 50), networks of your own;
            CKCA with its forms of AdaKD and FeatReg, warm start, shrink and perturb, LwF, scratch; pictures from folders,
            CIFAR, MNIST's format, arrays; safetensors checkpoints with torchvision's names, training states; AVX-512,
            AVX2, SSE2 and NEON kernels, Winograd convolutions, a thread pool; ckca_cuda.cu, tested on the CPU only
   =================================================================================================================== */

/*
This software is available under two licences: choose whichever you prefer.

-------------------------------------------------------------------------------
ALTERNATIVE A - MIT License

Copyright (c) 2026 the authors of ckca.h

Permission is hereby granted, free of charge, to any person obtaining a copy of
this software and associated documentation files (the "Software"), to deal in
the Software without restriction, including without limitation the rights to
use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
of the Software, and to permit persons to whom the Software is furnished to do
so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.

-------------------------------------------------------------------------------
ALTERNATIVE B - Public Domain (www.unlicense.org)

This is free and unencumbered software released into the public domain.

Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
software, either in source code form or as a compiled binary, for any purpose,
commercial or non-commercial, and by any means.

In jurisdictions that recognize copyright laws, the author or authors of this
software dedicate any and all copyright interest in the software to the public
domain. We make this dedication for the benefit of the public at large and to
the detriment of our heirs and successors. We intend this dedication to be an
overt act of relinquishment in perpetuity of all present and future rights to
this software under copyright law.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
