#include "safetensors.hpp"

#include <cstring>
#include <fstream>

#include "files.hpp"
#include "support.hpp"

namespace finetune {
namespace {

// A file of the given header and `data_bytes` zeros; `claimed` overrides the header's length field.
void write_raw(const std::filesystem::path& path, const std::string& header, size_t data_bytes, int64_t claimed = -1) {
  const uint64_t length = claimed < 0 ? header.size() : static_cast<uint64_t>(claimed);
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), sizeof length);
  file << header << std::string(data_bytes, '\0');
}

TEST(Safetensors, RoundTripKeepsValuesShapesDtypesAndMetadata) {
  const TemporaryFolder folder;
  Safetensors written;
  written.metadata["labels"] = R"(["a", "ö"])";
  for (const auto dtype : {torch::kDouble, torch::kFloat, torch::kHalf, torch::kBFloat16, torch::kLong, torch::kInt,
                           torch::kShort, torch::kChar, torch::kByte, torch::kBool}) {
    written.tensors[c10::toString(dtype)] = torch::arange(6).reshape({2, 3}).to(dtype);
  }
  written.tensors["scalar"] = torch::tensor(2.5);
  written.tensors["empty"] = torch::zeros({0, 4});
  written.tensors["transposed"] = torch::arange(6).reshape({2, 3}).t();

  save_safetensors(folder / "file", written);
  const Safetensors read = load_safetensors(folder / "file");
  EXPECT_EQ(read.metadata, written.metadata);
  ASSERT_EQ(read.tensors.size(), written.tensors.size());
  for (const auto& [name, tensor] : written.tensors) {
    EXPECT_EQ(read.tensors.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(read.tensors.at(name).equal(tensor)) << name;
  }
  EXPECT_FALSE(std::filesystem::exists(folder / "file.tmp"));
}

TEST(Safetensors, ReadsWhatThePythonLibraryWrote) {
  const Safetensors file = load_safetensors(golden("tiny/expected.safetensors"));
  EXPECT_EQ(file.tensors.at("tokens").sizes(), (std::vector<int64_t>{3, 9}));
  EXPECT_EQ(file.tensors.at("mask").scalar_type(), torch::kBool);
  EXPECT_EQ(file.tensors.at("mask").sum().item<int64_t>(), 9 + 4 + 6);
}

TEST(Safetensors, AMissingFileIsNamed) {
  EXPECT_NE(error_of([] { load_safetensors("/nowhere/model.safetensors"); }).find("/nowhere/model.safetensors"),
            std::string::npos);
}

struct Damage {
  const char* name;
  const char* header;
  size_t data_bytes;
  int64_t claimed;
  const char* message;
};

class DamagedSafetensors : public testing::TestWithParam<Damage> {};

TEST_P(DamagedSafetensors, IsRefusedWithItsNameAndTheReason) {
  const TemporaryFolder folder;
  const Damage& damage = GetParam();
  write_raw(folder / "bad", damage.header, damage.data_bytes, damage.claimed);
  const std::string message = error_of([&] { load_safetensors(folder / "bad"); });
  EXPECT_NE(message.find((folder / "bad").string()), std::string::npos) << message;
  EXPECT_NE(message.find(damage.message), std::string::npos) << message;
}

constexpr const char* kGood = R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";

INSTANTIATE_TEST_SUITE_P(
    Kinds, DamagedSafetensors,
    testing::Values(
        Damage{"HeaderLongerThanFile", kGood, 8, 1000, "header claims 1000 bytes"},
        Damage{"HeaderLengthHuge", kGood, 8, INT64_MAX, "header claims"},
        Damage{"HeaderCutShort", kGood, 8, 10, "not valid JSON"},
        Damage{"HeaderNoObject", "[1]", 0, -1, "not a JSON object"},
        Damage{"DataTruncated", kGood, 7, -1, "need 8 bytes of data, but it holds 7"},
        Damage{"DataSurplus", kGood, 9, -1, "need 8 bytes of data, but it holds 9"},
        Damage{"UnknownDtype", R"({"x":{"dtype":"F4","shape":[2],"data_offsets":[0,8]}})", 8, -1, "unknown dtype F4"},
        Damage{"SizeAgainstShape", R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8, -1, "need 12 bytes"},
        Damage{"Overlap",
               R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
               12, -1, "begins at byte 4 where 8 was expected"},
        Damage{"Gap",
               R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("y":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}})",
               16, -1, "begins at byte 12 where 8 was expected"},
        Damage{"OffsetsReversed", R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, -1,
               "spans bytes 8 to 0"},
        Damage{"OffsetNegative", R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}})", 8, -1,
               "not two byte counts"},
        Damage{"ShapeNegative", R"({"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8, -1, "holds -2"},
        Damage{"ShapeOverflows", R"({"x":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}})", 8,
               -1, "overflows"},
        Damage{"FieldMissing", R"({"x":{"dtype":"F32","shape":[2]}})", 8, -1, "lacks dtype, shape or data_offsets"},
        Damage{"NameTwice",
               R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
               R"("x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
               8, -1, "names 'x' twice"},
        Damage{"MetadataNoString", R"({"__metadata__":{"a":1}})", 0, -1, "metadata 'a' is not a string"}),
    [](const auto& info) { return info.param.name; });

TEST(Safetensors, AFileShorterThanItsLengthFieldIsRefused) {
  const TemporaryFolder folder;
  std::ofstream(folder / "bad") << "abc";
  EXPECT_NE(error_of([&] { load_safetensors(folder / "bad"); }).find("shorter"), std::string::npos);
}

TEST(Safetensors, ADtypeTheFormatLacksIsRefusedByName) {
  const TemporaryFolder folder;
  Safetensors content;
  content.tensors["z"] = torch::zeros({2}, torch::kComplexFloat);
  EXPECT_NE(error_of([&] { save_safetensors(folder / "file", content); }).find("'z'"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder / "file"));
}

}  // namespace
}  // namespace finetune
