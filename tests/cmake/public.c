#include <ckca.h>
#include <string.h>

int main(void) { return strcmp(ckca_version(), CKCA_VERSION) != 0; }
