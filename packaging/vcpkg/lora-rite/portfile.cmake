# An overlay port: it installs the checkout in which it lies. A port for vcpkg's registry takes the release instead
# (vcpkg_from_github with REF and SHA512).
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

set(VCPKG_BUILD_TYPE release) # headers only

# LibTorch is none of vcpkg's: FindLibTorch.cmake asks Torch_DIR first, then python3.
set(options -DLORA_RITE_BUILD_TESTS=OFF -DLORA_RITE_BUILD_EXAMPLES=OFF -DLORA_RITE_BUILD_BENCH=OFF -DLORA_RITE_INSTALL=ON)
if(DEFINED ENV{Torch_DIR})
  list(APPEND options "-DTorch_DIR=$ENV{Torch_DIR}")
endif()

vcpkg_cmake_configure(SOURCE_PATH "${SOURCE_PATH}" OPTIONS ${options})
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME lora_rite CONFIG_PATH share/cmake/lora_rite)

file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/lib" "${CURRENT_PACKAGES_DIR}/debug")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
