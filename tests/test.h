/* test.h: shared by the test programs. test_group("what is checked") begins a group of checks, CHECK(condition, "what
   was expected, with the numbers", ...) counts one and prints it if it fails, and main ends with return
   test_summary(). Programs that write files do so between test_enter and test_leave, in a folder of their own, since
   several programs may run at a time. */
#ifndef TEST_H
#define TEST_H
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static int test_passed, test_failed;
static const char *test_now;                 /* the group under way, NULL: none */
static int test_now_passed, test_now_failed; /* the totals when it began */

#define CHECK(condition, ...)                                                                               \
    do {                                                                                                    \
        if (condition) {                                                                                    \
            test_passed++;                                                                                  \
        } else {                                                                                            \
            test_failed++;                                                                                  \
            printf("FAIL %s:%d%s%s: ", __FILE__, __LINE__, test_now ? ", " : "", test_now ? test_now : ""); \
            printf(__VA_ARGS__);                                                                            \
            printf("\n");                                                                                   \
            fflush(stdout);                                                                                 \
        }                                                                                                   \
    } while (0)

/* Ends the group under way by printing its counts, and begins the next; name is not copied. NULL begins none. */
static inline void test_group(const char *name) {
    if (test_now) printf("   %d passed, %d failed\n", test_passed - test_now_passed, test_failed - test_now_failed);
    if (name) printf("-- %s\n", name);
    fflush(stdout); /* if the program crashes, the log's last line names the group */
    test_now = name;
    test_now_passed = test_passed;
    test_now_failed = test_failed;
}

/* From the repository's root into build/run.PID, which has a link to tests and an empty folder build; and back. */
static inline void test_enter(void) {
    char folder[64];
    snprintf(folder, sizeof folder, "build/run.%ld", (long)getpid());
    mkdir("build", 0777);
    if (mkdir(folder, 0777) || chdir(folder) || symlink("../../tests", "tests") || mkdir("build", 0777))
        printf("FAIL: cannot make the folder %s\n", folder), test_failed++;
}
static inline void test_leave(void) {
    char folder[64];
    snprintf(folder, sizeof folder, "build/run.%ld", (long)getpid());
    if (unlink("tests") || rmdir("build") || chdir("../..") || rmdir(folder))
        printf("FAIL: files were left in %s\n", folder), test_failed++;
}

/* Ends the last group and prints the line that every test program ends with. Returns main's exit status. */
static inline int test_summary(void) {
    test_group(NULL);
    printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed != 0;
}
#endif
