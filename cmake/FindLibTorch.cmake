# Provides the target LibTorch::torch, LibTorch_CONFIG_DIR (where its TorchConfig.cmake lies) and LibTorch_HAS_CUDA (is it
# a CUDA build, with the libraries that it needs?).
#
# Why not simply find_package(Torch)? It fails on three common machines:
# - LibTorch came with `pip install torch`, whose CMake files lie on no path that CMake searches: python3 is asked.
# - The wheel is a CUDA build and the CUDA toolkit is not there, or in part. TorchConfig.cmake then stops with a fatal
#   error, although code that needs no nvcc compiles and links well. For CUDA builds the target is made by hand.
# - The wheel is a CUDA build and came without CUDA's own libraries (cuBLAS, cuDNN, ...: some GB), as `pip install
#   --no-deps torch` leaves it and scripts/setup does where there is no GPU. libtorch.so and libtorch_cuda.so then do not
#   load, but libtorch_cpu.so does, and is all that a CPU needs: the target links no more than that.
# A project that wants Torch's own CUDA settings calls find_package(Torch) first: an existing target `torch` is used.
#
# Looked through, in this order: Torch_DIR, Torch_ROOT and CMAKE_PREFIX_PATH (as CMake variables, then as environment
# variables), LibTorch_HINTS, the torch of python3, the system. This file is installed beside the package's config, so
# that find_package(lora_rite) looks the same way.

if(TARGET LibTorch::torch)
  set(LibTorch_FOUND TRUE)
  return()
endif()

set(_hints ${Torch_DIR} ${Torch_ROOT} ${CMAKE_PREFIX_PATH})
foreach(_variable Torch_DIR Torch_ROOT CMAKE_PREFIX_PATH)
  file(TO_CMAKE_PATH "$ENV{${_variable}}" _paths)
  list(APPEND _hints ${_paths})
endforeach()
list(APPEND _hints ${LibTorch_HINTS})
set(_suffixes Torch share/cmake/Torch cmake/Torch)
find_path(LibTorch_CONFIG_DIR TorchConfig.cmake HINTS ${_hints} PATH_SUFFIXES ${_suffixes} NO_DEFAULT_PATH)
if(NOT LibTorch_CONFIG_DIR)
  execute_process(
    COMMAND python3 -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE _python_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  find_path(LibTorch_CONFIG_DIR TorchConfig.cmake
    HINTS "${_python_torch}" PATHS /usr/local /usr PATH_SUFFIXES ${_suffixes} NO_DEFAULT_PATH)
endif()
mark_as_advanced(LibTorch_CONFIG_DIR)

if(LibTorch_CONFIG_DIR)
  include("${LibTorch_CONFIG_DIR}/TorchConfigVersion.cmake" OPTIONAL)
  set(LibTorch_VERSION "${PACKAGE_VERSION}")
  get_filename_component(_root "${LibTorch_CONFIG_DIR}/../../.." ABSOLUTE)
  add_library(LibTorch::torch INTERFACE IMPORTED GLOBAL)

  set(_cuda_build FALSE)
  set(LibTorch_HAS_CUDA FALSE)
  set(_lib "${_root}/lib/lib")
  if(EXISTS "${_lib}torch_cuda.so")
    set(_cuda_build TRUE)
    execute_process(COMMAND ldd "${_lib}torch_cuda.so" OUTPUT_VARIABLE _loaded ERROR_QUIET)
    if(NOT _loaded MATCHES "([^ \t\n]+) => not found") # no ldd: as if all were there
      set(LibTorch_HAS_CUDA TRUE)
    endif()
    set(_missing "${CMAKE_MATCH_1}")
  endif()
  if(TARGET torch OR NOT _cuda_build)
    get_property(_before DIRECTORY PROPERTY IMPORTED_TARGETS)
    if(NOT TARGET torch)
      find_package(Torch CONFIG REQUIRED PATHS "${LibTorch_CONFIG_DIR}" NO_DEFAULT_PATH)
    endif()
    # stdc++ first: libtorch.so of CUDA wheels exports std::filesystem::remove_all and others of another compiler's
    # libstdc++, and a program that finds those first dies in them.
    set_target_properties(LibTorch::torch PROPERTIES INTERFACE_LINK_LIBRARIES "$<$<BOOL:${_cuda_build}>:stdc++>;torch")
    # An imported target is visible in its own directory only, but whoever links lora_rite links these.
    get_property(_made DIRECTORY PROPERTY IMPORTED_TARGETS)
    list(REMOVE_ITEM _made ${_before})
    foreach(_target IN LISTS _made)
      set_target_properties(${_target} PROPERTIES IMPORTED_GLOBAL TRUE)
    endforeach()
  else()
    # no-as-needed: torch_cuda registers its kernels when it is loaded, no symbol asks for it.
    # stdc++ first: as above.
    # allow-shlib-undefined: its own dependencies (cuBLAS, ...) lie in other wheels, which its run path names.
    if(LibTorch_HAS_CUDA)
      message(STATUS "LibTorch is a CUDA build: linking its libraries without asking for the CUDA toolkit")
      set(_libraries "\"${_lib}torch.so\" \"${_lib}torch_cuda.so\" \"${_lib}torch_cpu.so\" \"${_lib}c10_cuda.so\" \"${_lib}c10.so\"")
    else()
      message(STATUS "LibTorch is a CUDA build without CUDA's libraries (${_missing} is missing): linking what runs on a CPU")
      set(_libraries "\"${_lib}torch_cpu.so\" \"${_lib}c10.so\"")
    endif()
    # The wheels of 2.6 have the C++ ABI of before GCC 5, which the compiler must be told; TorchConfig.cmake has the word.
    file(STRINGS "${LibTorch_CONFIG_DIR}/TorchConfig.cmake" _abi REGEX "set\\(TORCH_CXX_FLAGS .*_GLIBCXX_USE_CXX11_ABI=[01]")
    string(REGEX MATCH "_GLIBCXX_USE_CXX11_ABI=[01]" _abi "${_abi}")
    find_package(Threads REQUIRED)
    set_target_properties(Threads::Threads PROPERTIES IMPORTED_GLOBAL TRUE)
    set_target_properties(LibTorch::torch PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${_root}/include;${_root}/include/torch/csrc/api/include"
      INTERFACE_COMPILE_DEFINITIONS "USE_DISTRIBUTED;USE_C10D_GLOO;USE_RPC;USE_TENSORPIPE;${_abi}" # as in Caffe2Targets.cmake
      INTERFACE_LINK_OPTIONS "LINKER:--allow-shlib-undefined;LINKER:-rpath,${_root}/lib"
      INTERFACE_LINK_LIBRARIES "-Wl,--no-as-needed -lstdc++ ${_libraries} -Wl,--as-needed;Threads::Threads")
  endif()

  if(LibTorch_VERSION VERSION_GREATER_EQUAL 2.14) # from there on its headers do not compile as C++17
    set_property(TARGET LibTorch::torch APPEND PROPERTY INTERFACE_COMPILE_FEATURES cxx_std_20)
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_CONFIG_DIR VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "Run scripts/setup, or set CMAKE_PREFIX_PATH to the torch.utils.cmake_prefix_path of a Python torch")
