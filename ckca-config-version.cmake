# The version is that of the installed header. A request for an older one of the same series is met: the same major
# version, before 1.0 also the same minor one.
file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../../../include/ckca.h" PACKAGE_VERSION REGEX "define CKCA_VERSION \"")
string(REGEX MATCH "[0-9.]+" PACKAGE_VERSION "${PACKAGE_VERSION}")
string(REGEX MATCH "^(0\\.[0-9]+|[0-9]+)" ckca_series "${PACKAGE_VERSION}")
if("${PACKAGE_FIND_VERSION}." MATCHES "^${ckca_series}\\." AND NOT PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION)
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
    set(PACKAGE_VERSION_EXACT TRUE)
endif()
unset(ckca_series)
