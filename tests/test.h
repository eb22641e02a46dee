/* test.h: what every test program shares. CHECK(condition, "what was expected, with the numbers", ...) counts, and prints
   the failures; end main with return test_summary(). Programs that write files do so between test_enter and test_leave,
   in a folder of their own: several may run at a time. */
#ifndef TEST_H
#define TEST_H
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static int test_passed, test_failed;

#define CHECK(condition, ...)                           \
    do {                                                \
        if (condition) {                                \
            test_passed++;                              \
        } else {                                        \
            test_failed++;                              \
            printf("FAIL %s:%d: ", __FILE__, __LINE__); \
            printf(__VA_ARGS__);                        \
            printf("\n");                               \
            fflush(stdout);                             \
        }                                               \
    } while (0)

/* From the repository's root to build/run.PID, where tests is what it was and build is empty; and back. */
static inline void test_enter(void) {
    char folder[64];
    snprintf(folder, sizeof folder, "build/run.%ld", (long)getpid());
    mkdir("build", 0777);
    if (mkdir(folder, 0777) || chdir(folder) || symlink("../../tests", "tests") || mkdir("build", 0777))
        printf("FAIL: no folder %s\n", folder), test_failed++;
}
static inline void test_leave(void) {
    char folder[64];
    snprintf(folder, sizeof folder, "build/run.%ld", (long)getpid());
    if (unlink("tests") || rmdir("build") || chdir("../..") || rmdir(folder))
        printf("FAIL: files were left in %s\n", folder), test_failed++;
}

/* Prints the line that every test program ends with; main's exit status. */
static int test_summary(void) {
    printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed != 0;
}
#endif
