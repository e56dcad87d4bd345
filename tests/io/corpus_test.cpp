#include <gtest/gtest.h>

#include <fstream>

#include "fuzz/targets.hpp"

namespace lora_rite::test {
namespace {

/// Every input of a fuzzer's corpus, what it once found among them, is read or refused as promised.
size_t replay(const std::string& target, void (*use)(const std::string&)) {
  size_t count = 0;
  const std::filesystem::path corpus = std::filesystem::path(LORA_RITE_TEST_DATA_DIR) / "fuzz" / "corpus" / target;
  for (const auto& entry : std::filesystem::directory_iterator(corpus)) {
    SCOPED_TRACE(entry.path());
    std::ifstream file(entry.path(), std::ios::binary);
    EXPECT_NO_THROW(use({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()}));
    ++count;
  }
  return count;
}

TEST(FuzzCorpus, SafetensorsAreReadOrRefused) { EXPECT_GE(replay("safetensors", fuzz::safetensors), 30U); }

TEST(FuzzCorpus, AdapterConfigsAreReadOrRefused) { EXPECT_GE(replay("adapter_config", fuzz::adapter_config), 20U); }

TEST(FuzzCorpus, CheckpointsAreReadOrRefused) { EXPECT_GE(replay("checkpoint", fuzz::checkpoint), 40U); }

}  // namespace
}  // namespace lora_rite::test
