# Install and export: headers, licence, and a package in which no path of this machine occurs.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(_package_dir "${CMAKE_INSTALL_DATADIR}/cmake/lora_rite") # share/: headers fit every architecture
write_basic_package_version_file("${PROJECT_BINARY_DIR}/lora_rite-config-version.cmake"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)

set(_built_for "") # LibTorch's version, MAJOR.MINOR, where something is compiled
if(LORA_RITE_BUILD_COMPILED OR LORA_RITE_BUILD_CUDA)
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" _built_for "${LibTorch_VERSION}")
endif()
configure_file(cmake/lora_rite-config.cmake.in "${PROJECT_BINARY_DIR}/lora_rite-config.cmake" @ONLY)

set(_targets lora_rite)
if(LORA_RITE_BUILD_COMPILED)
  list(APPEND _targets lora_rite_compiled)
endif()
install(TARGETS ${_targets} EXPORT lora_rite-targets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
if(LORA_RITE_BUILD_CUDA)
  install(TARGETS lora_rite_cuda EXPORT lora_rite-cuda-targets)
  install(EXPORT lora_rite-cuda-targets NAMESPACE lora_rite:: DESTINATION "${_package_dir}")
endif()
install(EXPORT lora_rite-targets NAMESPACE lora_rite:: DESTINATION "${_package_dir}")
install(DIRECTORY include/lora_rite DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DOCDIR}")
install(FILES
  cmake/FindLibTorch.cmake "${PROJECT_BINARY_DIR}/lora_rite-config.cmake" "${PROJECT_BINARY_DIR}/lora_rite-config-version.cmake"
  DESTINATION "${_package_dir}")
