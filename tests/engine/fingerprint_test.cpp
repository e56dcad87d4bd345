#include <gtest/gtest.h>

#include <cstdint>
#include <lora_rite/engine/host/fingerprint.hpp>
#include <vector>

namespace lora_rite::test {
using namespace host;
namespace {

Fingerprint of(const std::vector<float>& values) {
  const auto size = static_cast<int64_t>(values.size());
  return {values.data(), size, Fingerprint::stride_of(size)};
}

std::vector<float> numbers(int64_t size) {
  std::vector<float> values(static_cast<size_t>(size));
  for (size_t i = 0; i < values.size(); ++i) values[i] = 0.25F + static_cast<float>(i % 97);
  return values;
}

TEST(Fingerprint, OfASmallFactorNoticesEveryElement) {
  for (int64_t size = 1; size <= 64; ++size) {
    std::vector<float> values = numbers(size);
    const Fingerprint before = of(values);
    EXPECT_TRUE(before == of(values)) << size;
    for (float& value : values) {
      value += 1;
      EXPECT_TRUE(before != of(values)) << size << ": element " << &value - values.data();
      value -= 1;
    }
  }
}

TEST(Fingerprint, ReachesEveryColumnInBothLayouts) {
  for (const int64_t rank : {1, 2, 3, 4, 8, 12, 16}) {
    for (const int64_t rows : {16, 60, 512, 768, 1000, 2048, 11008}) {
      for (const bool rank_first : {true, false}) {
        std::vector<float> values = numbers(rows * rank);
        const Fingerprint before = of(values);
        for (int64_t column = 0; column < rank; ++column) {
          std::vector<float> changed = values;
          for (int64_t row = 0; row < rows; ++row)
            changed[static_cast<size_t>(rank_first ? column * rows + row : row * rank + column)] += 1;
          EXPECT_TRUE(before != of(changed)) << rows << " × " << rank << ", column " << column << ", " << rank_first;
        }
      }
    }
  }
}

TEST(Fingerprint, OfNothingIsEqualToNone) {
  EXPECT_FALSE(Fingerprint() == Fingerprint());
  EXPECT_FALSE(Fingerprint() == of(numbers(100)));
}

}  // namespace
}  // namespace lora_rite::test
