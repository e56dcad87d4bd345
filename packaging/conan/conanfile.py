"""A recipe for Conan 2: the headers and CMake's package, from the checkout in which it lies.

LibTorch is none of Conan's here: it is looked for in Torch_DIR, CMAKE_PREFIX_PATH and Python's torch, when this package
is made and when it is used.
"""

import os
import re

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout
from conan.tools.files import copy, load


class LoraRite(ConanFile):
    """Header-only, so that one package fits all settings."""

    name = "lora_rite"
    description = "LoRA-RITE, an optimizer for LoRA factors, for LibTorch"
    license = "Apache-2.0"
    topics = ("lora", "optimizer", "libtorch", "pytorch", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"with_io": [True, False]}  # noqa: RUF012  Conan's form
    default_options = {"with_io": True}  # noqa: RUF012

    @property
    def _checkout(self):
        return os.path.join(self.recipe_folder, os.pardir, os.pardir)

    def set_version(self):
        header = load(self, os.path.join(self._checkout, "include/lora_rite/version.hpp"))
        self.version = ".".join(re.findall(r"#define LORA_RITE_VERSION_\w+ (\d+)", header))

    def export_sources(self):
        for pattern in ("CMakeLists.txt", "LICENSE", "include/*", "cmake/*", "src/*"):
            copy(self, pattern, self._checkout, self.export_sources_folder)

    def requirements(self):
        if self.options.with_io:  # what lora_rite/io/ and lora_rite/nn/peft.hpp include
            self.requires("nlohmann_json/[>=3.11 <4]", transitive_headers=True)

    def validate(self):
        check_min_cppstd(self, 17)

    def layout(self):
        cmake_layout(self)

    def package_id(self):
        self.info.settings.clear()

    def generate(self):
        toolchain = CMakeToolchain(self)
        for part in ("TESTS", "EXAMPLES", "BENCH"):
            toolchain.cache_variables[f"LORA_RITE_BUILD_{part}"] = False
        toolchain.cache_variables["LORA_RITE_INSTALL"] = True
        if "Torch_DIR" in os.environ:
            toolchain.cache_variables["Torch_DIR"] = os.environ["Torch_DIR"]
        toolchain.generate()

    def build(self):
        CMake(self).configure()

    def package(self):
        CMake(self).install()
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))

    def package_info(self):
        # CMake's own package is used, which looks for LibTorch; Conan generates none beside it.
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = [os.path.join("share", "cmake", "lora_rite")]
        self.cpp_info.libdirs = []
        self.cpp_info.bindirs = []
