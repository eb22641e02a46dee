# The targets ckca::ckca (the header, threads and the mathematical library) and, where make install-shared has put
# libckca.so, ckca::shared (the header and that library). ckca_cuda_source is ckca_cuda.cu.
include(CMakeFindDependencyMacro)
if(NOT ckca_include) # installed: this file is in PREFIX/lib/cmake/ckca
    get_filename_component(ckca_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
    set(ckca_include "${ckca_prefix}/include")
    set(ckca_cuda_source "${ckca_prefix}/share/ckca/ckca_cuda.cu")
    set(ckca_shared "${ckca_prefix}/lib/libckca.so")
else()
    set(ckca_cuda_source "${ckca_include}/ckca_cuda.cu")
endif()
if(NOT TARGET ckca::ckca)
    set(THREADS_PREFER_PTHREAD_FLAG ON)
    find_dependency(Threads)
    add_library(ckca::ckca INTERFACE IMPORTED GLOBAL)
    set_target_properties(ckca::ckca PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${ckca_include}"
        INTERFACE_LINK_LIBRARIES "Threads::Threads;$<$<NOT:$<PLATFORM_ID:Windows>>:m>")
endif()
if(ckca_shared AND EXISTS "${ckca_shared}" AND NOT TARGET ckca::shared)
    add_library(ckca::shared SHARED IMPORTED GLOBAL)
    set_target_properties(ckca::shared PROPERTIES IMPORTED_LOCATION "${ckca_shared}"
        INTERFACE_INCLUDE_DIRECTORIES "${ckca_include}")
endif()
unset(ckca_include)
unset(ckca_shared)
