#define CKCA_IMPLEMENTATION
#include <ckca.h>

int main(void) {
    ckca_context *ctx;
    if (ckca_init(&ctx, NULL)) return 1;
    ckca_context_free(ctx);
    return 0;
}
