/* test.h: what every test program shares. CHECK(condition, "what was expected, with the numbers", ...) counts, and prints
   the failures; end main with return test_summary(). */
#ifndef TEST_H
#define TEST_H
#include <stdio.h>

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

/* Prints the line that every test program ends with; main's exit status. */
static int test_summary(void) {
    printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed != 0;
}
#endif
