#include "lora_rite/engine/cuda/elements.hpp"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

/// The half types beside LibTorch's.
namespace lora_rite::test {
using namespace cuda;
namespace {

/// Equal, or both NaN.
bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

TEST(CudaElements, EveryHalfIsReadAsLibTorchReadsIt) {
  for (uint32_t all = 0; all < 65536; ++all) {
    const auto stored = static_cast<uint16_t>(all);
    ASSERT_TRUE(same(bits::from_half(stored), c10::Half(stored, c10::Half::from_bits()))) << all;
    ASSERT_TRUE(same(bits::from_bfloat16(stored), c10::BFloat16(stored, c10::BFloat16::from_bits()))) << all;
  }
}

TEST(CudaElements, FloatsAreRoundedAsLibTorchRoundsThem) {
  std::vector<float> values = {0.0F,
                               -0.0F,
                               65504.0F,
                               65519.9F,
                               65520.0F,
                               1e10F,
                               -1e10F,
                               0x1p-24F,
                               0x1p-25F,
                               3e-8F,
                               0x1p-14F,
                               0x1.ffcp-15F,
                               0x1.ffep-15F,
                               1e-40F,
                               3.4e38F,
                               std::numeric_limits<float>::infinity(),
                               std::numeric_limits<float>::quiet_NaN()};
  std::mt19937 engine(5);
  for (int i = 0; i < 200000; ++i) {
    const auto any = static_cast<uint32_t>(engine());
    values.push_back(bits::as_float(any));
    // Halfway between two halves, and two bfloat16.
    values.push_back(bits::as_float((any & 0xFFFFE000U) | 0x1000U));
    values.push_back(bits::as_float((any & 0xFFFF0000U) | 0x8000U));
  }
  for (const float x : values) {
    ASSERT_TRUE(same(bits::from_half(bits::to_half(x)), c10::Half(x))) << x;
    ASSERT_TRUE(same(bits::from_bfloat16(bits::to_bfloat16(x)), c10::BFloat16(x))) << x;
  }
}

TEST(CudaElements, WhatIsTooLargeIsHeldAtTheLargest) {
  EXPECT_EQ(rounded(1e9, Dtype::Half), 65504.0);
  EXPECT_EQ(rounded(-1e300, Dtype::BFloat16), -static_cast<double>(std::numeric_limits<c10::BFloat16>::max()));
  EXPECT_EQ(rounded(1e9, Dtype::Float), 1e9F);
  EXPECT_TRUE(std::isnan(rounded(std::numeric_limits<double>::quiet_NaN(), Dtype::Half)));
}

}  // namespace
}  // namespace lora_rite::test
