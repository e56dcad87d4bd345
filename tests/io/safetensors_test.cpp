#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <lora_rite/io/safetensors.hpp>
#include <set>

#include "support/pairs.hpp"
#include "support/temporary_folder.hpp"
#include "support/tensors.hpp"
#include "support/torch.hpp"

namespace lora_rite::test {
namespace {

/// The bytes of a file of this header and these data; `claimed` overrides the length of the header.
std::string file_of(const std::string& header, const std::string& data, int64_t claimed = -1) {
  const uint64_t length = claimed < 0 ? header.size() : static_cast<uint64_t>(claimed);
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + header + data;
}

/// A tensor of every dtype of the format, with bits of all kinds in the floating ones.
std::map<std::string, torch::Tensor> all_dtypes() {
  torch::manual_seed(3);
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& [name, dtype] : detail::kSafetensorsDtypes) {
    const auto bytes = torch::randint(0, dtype == torch::kBool ? 2 : 256,
                                      {2, 3 * static_cast<int64_t>(c10::elementSize(dtype))}, torch::kByte);
    tensors[std::string(name)] = bytes.view(dtype);
  }
  return tensors;
}

TEST(Safetensors, RoundTripKeepsBitsShapesDtypesAndMetadata) {
  const TemporaryFolder folder;
  std::map<std::string, torch::Tensor> written = all_dtypes();
  written["scalar"] = torch::tensor(2.5);
  written["empty"] = torch::zeros({0, 4});
  written["ö/\"\n"] = torch::ones({1});
  written[""] = torch::ones({2});
  const std::map<std::string, std::string> metadata = {{"labels", R"(["a", "ö"])"}, {"", "x\ny"}};

  save_safetensors(folder / "file", written, metadata);
  const Safetensors read = load_safetensors(folder / "file");
  EXPECT_EQ(read.metadata, metadata);
  ASSERT_EQ(read.tensors.size(), written.size());
  for (const auto& [name, tensor] : written) {
    EXPECT_EQ(read.tensors.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(read.tensors.at(name).sizes(), tensor.sizes()) << name;
    EXPECT_TRUE(read.tensors.at(name).numel() == 0 || same_bits(read.tensors.at(name), tensor)) << name;
  }
  EXPECT_FALSE(std::filesystem::exists(folder / "file.tmp"));
}

TEST(Safetensors, WhatAViewShowsIsWritten) {
  const TemporaryFolder folder;
  const torch::Tensor square = torch::arange(6, torch::kFloat).reshape({2, 3});
  const torch::Tensor complex = torch::complex(square, square + 1);
  save_safetensors(folder / "file", {{"transposed", square.t()},
                                     {"column", square.select(1, 1)},
                                     {"expanded", torch::ones({1}).expand({3})},
                                     {"conjugated", complex.conj()},
                                     {"negated", torch::_neg_view(square)},
                                     {"trained", square.clone().requires_grad_()}});
  const Safetensors read = load_safetensors(folder / "file");
  EXPECT_TRUE(read.tensors.at("transposed").equal(square.t()));
  EXPECT_TRUE(read.tensors.at("column").equal(square.select(1, 1)));
  EXPECT_TRUE(read.tensors.at("expanded").equal(torch::ones({3})));
  EXPECT_TRUE(read.tensors.at("conjugated").equal(torch::complex(square, -square - 1)));
  EXPECT_TRUE(read.tensors.at("negated").equal(-square));
  EXPECT_FALSE(read.tensors.at("trained").requires_grad());
}

TEST(Safetensors, ReadsWhatThePythonLibraryWrote) {
  const Safetensors file = load_safetensors(golden("tiny/expected.safetensors"));
  EXPECT_EQ(file.tensors.at("tokens").sizes(), (std::vector<int64_t>{3, 9}));
  EXPECT_EQ(file.tensors.at("mask").scalar_type(), torch::kBool);
  EXPECT_EQ(file.tensors.at("mask").sum().item<int64_t>(), 9 + 4 + 6);
}

TEST(Safetensors, NamesShapesAndDtypesAreListedWithoutTheData) {
  const TemporaryFolder folder;
  save_safetensors(folder / "file", {{"b", torch::zeros({2, 3}, torch::kHalf)}, {"a", torch::zeros({4}, torch::kInt)}});
  const SafetensorsFile file(folder / "file");
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(file.contains("a"));
  EXPECT_FALSE(file.contains("c"));
  EXPECT_EQ(file.info("b").dtype, torch::kHalf);
  EXPECT_EQ(file.info("b").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_TRUE(mentions(error_of([&] { file.info("c"); }), "file: has no tensor 'c'"));
  EXPECT_TRUE(mentions(error_of([&] { file.tensor("c"); }), "file: has no tensor 'c'"));
}

TEST(Safetensors, WritingToATensorChangesItsOtherViewsAndNeverTheFile) {
  const TemporaryFolder folder;
  save_safetensors(folder / "file", {{"x", torch::zeros({1000})}});
  const std::string before = read_bytes(folder / "file");
  const SafetensorsFile file(folder / "file");
  torch::Tensor x = file.tensor("x");
  x.fill_(7);
  EXPECT_TRUE(file.tensor("x").equal(torch::full({1000}, 7)));
  EXPECT_EQ(read_bytes(folder / "file"), before);
  EXPECT_TRUE(load_safetensors(folder / "file").tensors.at("x").equal(torch::zeros({1000})));
}

TEST(Safetensors, ATensorOutlivesTheReaderTheFileAndItsReplacement) {
  const TemporaryFolder folder;
  save_safetensors(folder / "file", {{"x", torch::arange(5000)}});
  const torch::Tensor x = load_safetensors(folder / "file").tensors.at("x");
  save_safetensors(folder / "file", {{"x", torch::zeros({5000})}});
  std::filesystem::remove(folder / "file");
  EXPECT_TRUE(x.equal(torch::arange(5000)));
}

TEST(Safetensors, AFileMayBeReplacedByItsOwnTensors) {
  const TemporaryFolder folder;
  save_safetensors(folder / "file", {{"x", torch::arange(5000)}});
  Safetensors content = load_safetensors(folder / "file");
  content.tensors.at("x").add_(1);
  save_safetensors(folder / "file", content.tensors);
  EXPECT_TRUE(load_safetensors(folder / "file").tensors.at("x").equal(torch::arange(1, 5001)));
}

/// How much memory the process has of its own, in bytes.
int64_t private_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0, shared = 0;
  file >> total >> resident >> shared;
  return (resident - shared) * sysconf(_SC_PAGESIZE);
}

TEST(Safetensors, ALargeFileIsReadWithoutMemoryOfItsOwn) {
  const TemporaryFolder folder;
  constexpr int64_t kBytes = 64 << 20;
  save_safetensors(folder / "file", {{"x", torch::ones({kBytes}, torch::kByte)}});
  const int64_t before = private_bytes();
  const Safetensors content = load_safetensors(folder / "file");
  EXPECT_EQ(content.tensors.at("x").sum().item<int64_t>(), kBytes);
  EXPECT_LT(private_bytes() - before, kBytes / 4);
}

TEST(Safetensors, DataAtAnAddressTheDtypeDoesNotAllowIsCopied) {
  const TemporaryFolder folder;
  const std::vector<float> values = {1.5, -2.25, 1e30F};
  std::string data = "?";
  data.append(reinterpret_cast<const char*>(values.data()), 12);
  const std::string header = R"({"byte":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("x":{"dtype":"F32","shape":[3],"data_offsets":[1,13]}})";
  for (int padding = 0; padding < 8; ++padding) {  // x at every address modulo 8
    write_bytes(folder / "file", file_of(header + std::string(padding, ' '), data));
    const torch::Tensor x = load_safetensors(folder / "file").tensors.at("x");
    EXPECT_EQ(reinterpret_cast<uintptr_t>(x.data_ptr()) % sizeof(float), 0U);
    EXPECT_TRUE(x.equal(torch::tensor(values)));
  }
}

TEST(Safetensors, TensorsThatWereWrittenHereAreNeverCopied) {
  const TemporaryFolder folder;
  save_safetensors(folder / "file", all_dtypes(), {{"an odd length", "?"}});
  const SafetensorsFile file(folder / "file");
  for (const std::string& name : file.names()) {
    EXPECT_EQ(file.tensor(name).data_ptr(), file.tensor(name).data_ptr()) << name;
  }
}

struct Damage {
  const char* name;
  std::string bytes;
  std::string message;
};

class DamagedSafetensors : public testing::TestWithParam<Damage> {};

TEST_P(DamagedSafetensors, IsRefusedWithItsNameAndTheReason) {
  const TemporaryFolder folder;
  write_bytes(folder / "bad", GetParam().bytes);
  const std::string message = error_of([&] { load_safetensors(folder / "bad"); });
  EXPECT_TRUE(mentions(message, "safetensors file " + (folder / "bad").string() + ": "));
  EXPECT_TRUE(mentions(message, GetParam().message));
}

/// A file with one tensor x, described by these fields, and so many bytes of data.
std::string tensor_file(const std::string& fields, size_t data_bytes) {
  return file_of(R"({"x":{)" + fields + "}}", std::string(data_bytes, '\0'));
}

const std::string kGood = R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
const std::string kEight(8, '\0');

std::string repeated(const std::string& text, size_t times) {
  std::string result;
  for (size_t i = 0; i < times; ++i) result += text;
  return result;
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, DamagedSafetensors,
    testing::Values(
        Damage{"Empty", "", "has 0 bytes, expected at least 8"},
        Damage{"SevenBytes", "abcdefg", "has 7 bytes, expected at least 8"},
        Damage{"LengthAlone", file_of("", ""), "its header is no JSON object"},
        Damage{"HeaderLongerThanFile", file_of(kGood, kEight, 1000),
               "claims a header of 1000 bytes, but only 62 bytes"},
        Damage{"HeaderLengthHuge", file_of(kGood, kEight, INT64_MAX), "claims a header of 9223372036854775807 bytes"},
        Damage{"HeaderLengthAllOnes", std::string(8, '\xFF') + kGood, "claims a header of 18446744073709551615 bytes"},
        Damage{"HeaderCutShort", file_of(kGood, kEight, 10), "its header is not valid JSON at byte"},
        Damage{"HeaderEmptyText", file_of("   ", ""), "its header is no JSON object"},
        Damage{"HeaderNoObject", file_of("[1]", ""), "its header is no JSON object"},
        Damage{"HeaderWithMarkOfByteOrder", file_of("\xEF\xBB\xBF{}", ""), "its header is no JSON object"},
        Damage{"HeaderWithSomethingBehind", file_of("{} {}", ""), "its header is not valid JSON at byte"},
        Damage{"HeaderWithNullByte", file_of(std::string("{}\0{", 4), ""), "it holds a null byte"},
        Damage{"HeaderNoUtf8", file_of("{\"\xC3\x28\":{}}", ""), "its header is not valid JSON at byte"},
        Damage{"HeaderDeep", file_of(repeated(R"({"x":)", 100000), ""), "tensor 'x' has a field 'x'"},
        Damage{"ListsDeep", file_of(R"({"x":)" + std::string(1000000, '['), ""), "tensor 'x' is a list"},
        Damage{"DataTruncated", file_of(kGood, std::string(7, '\0')), "need 8 bytes of data, but the file holds 7"},
        Damage{"DataSurplus", file_of(kGood, std::string(9, '\0')), "need 8 bytes of data, but the file holds 9"},
        Damage{"TensorNoObject", file_of(R"({"x":[1]})", ""), "tensor 'x' is a list, expected an object"},
        Damage{"TensorNull", file_of(R"({"x":null})", ""), "tensor 'x' is null, expected an object"},
        Damage{"DtypeUnknown", tensor_file(R"("dtype":"F4","shape":[2],"data_offsets":[0,1])", 1),
               "the dtype of tensor 'x' is 'F4', expected F64"},
        Damage{"DtypeNoText", tensor_file(R"("dtype":4,"shape":[2],"data_offsets":[0,8])", 8),
               "the dtype of tensor 'x' is 4"},
        Damage{"DtypeObject", tensor_file(R"("dtype":{},"shape":[2],"data_offsets":[0,8])", 8),
               "the dtype of tensor 'x' is an object"},
        Damage{"ShapeNoList", tensor_file(R"("dtype":"F32","shape":2,"data_offsets":[0,8])", 8),
               "the shape of tensor 'x' is 2, expected a list"},
        Damage{"ShapeNested", tensor_file(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])", 8),
               "dimension 0 of tensor 'x' is a list"},
        Damage{"ShapeNegative", tensor_file(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])", 8),
               "dimension 0 of tensor 'x' is -2"},
        Damage{"ShapeFraction", tensor_file(R"("dtype":"F32","shape":[1,2.0],"data_offsets":[0,8])", 8),
               "dimension 1 of tensor 'x' is 2.0"},
        Damage{"ShapeTooLarge", tensor_file(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8])", 8),
               "dimension 0 of tensor 'x' is 9223372036854775808"},
        Damage{"ShapeBeyondNumbers", tensor_file(R"("dtype":"F32","shape":[1e999],"data_offsets":[0,8])", 8),
               "its header is not valid JSON"},
        Damage{"ShapeOverflows",
               tensor_file(R"("dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8])", 8),
               "which is more than 2^63 bytes"},
        Damage{"ShapeOverflowsBesideZero",
               tensor_file(R"("dtype":"F32","shape":[0,4611686018427387904,8],"data_offsets":[0,0])", 0),
               "which is more than 2^63 bytes"},
        Damage{"ShapeOf65Dimensions",
               tensor_file(R"("dtype":"U8","shape":[1)" + repeated(",1", 64) + R"(],"data_offsets":[0,1])", 1),
               "tensor 'x' has more than 64 dimensions"},
        Damage{"SizeAgainstShape", tensor_file(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])", 8),
               "tensor 'x' spans bytes 0 to 8, expected 12 bytes for F32[3]"},
        Damage{"Overlap",
               file_of(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                       R"("y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
                       std::string(12, '\0')),
               "tensor 'y' begins at byte 4, expected 8 (an overlap)"},
        Damage{"Gap",
               file_of(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                       R"("y":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}})",
                       std::string(16, '\0')),
               "tensor 'y' begins at byte 12, expected 8 (a gap)"},
        Damage{"OffsetsReversed", tensor_file(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])", 8),
               "tensor 'x' spans bytes 8 to 0"},
        Damage{"OffsetNegative", tensor_file(R"("dtype":"F32","shape":[2],"data_offsets":[-8,0])", 8),
               "the begin in data_offsets of tensor 'x' is -8"},
        Damage{"OffsetBeyondTheFile", tensor_file(R"("dtype":"F32","shape":[2],"data_offsets":[8,16])", 8),
               "tensor 'x' begins at byte 8, expected 0 (a gap)"},
        Damage{"OffsetsWrapAround",
               tensor_file(R"("dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,0])", 8),
               "tensor 'x' spans bytes 18446744073709551608 to 0"},
        Damage{"OffsetAlone", tensor_file(R"("dtype":"F32","shape":[2],"data_offsets":[0])", 8),
               "the end in data_offsets of tensor 'x' is missing"},
        Damage{"OffsetsThree", tensor_file(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])", 8),
               "a third number in data_offsets of tensor 'x' is 8"},
        Damage{"OffsetsNoList", tensor_file(R"("dtype":"F32","shape":[2],"data_offsets":"0,8")", 8),
               "data_offsets of tensor 'x' is the text '0,8'"},
        Damage{"DtypeMissing", tensor_file(R"("shape":[2],"data_offsets":[0,8])", 8), "tensor 'x' has no dtype"},
        Damage{"ShapeMissing", tensor_file(R"("dtype":"F32","data_offsets":[0,8])", 8), "tensor 'x' has no shape"},
        Damage{"OffsetsMissing", tensor_file(R"("dtype":"F32","shape":[2])", 8), "tensor 'x' has no data_offsets"},
        Damage{"FieldUnknown", tensor_file(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"z":1)", 8),
               "tensor 'x' has a field 'z'"},
        Damage{"FieldTwice", tensor_file(R"("dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8])", 8),
               "tensor 'x' names 'dtype' twice"},
        Damage{"NameTwice",
               file_of(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                       R"("x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                       kEight),
               "the header names 'x' twice"},
        Damage{"BoolThatIsNone",
               file_of(R"({"x":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}})", std::string("\0\1\2", 3)),
               "element 2 of the BOOL tensor 'x' is 2, expected 0 or 1"},
        Damage{"MetadataNoObject", file_of(R"({"__metadata__":"a"})", ""), "__metadata__ is the text 'a'"},
        Damage{"MetadataNoText", file_of(R"({"__metadata__":{"a":1}})", ""), "__metadata__ 'a' is 1, expected a text"},
        Damage{"MetadataTwice", file_of(R"({"__metadata__":{},"__metadata__":{}})", ""), "names '__metadata__' twice"},
        Damage{"MetadataKeyTwice", file_of(R"({"__metadata__":{"a":"","a":""}})", ""), "names 'a' twice"}),
    [](const auto& info) { return info.param.name; });

TEST(Safetensors, EveryTruncationOfAFileIsRefused) {
  const TemporaryFolder folder;
  save_safetensors(folder / "file", {{"x", torch::arange(3)}, {"y", torch::zeros({2}, torch::kByte)}});
  const std::string whole = read_bytes(folder / "file");
  for (size_t size = 0; size < whole.size(); ++size) {
    write_bytes(folder / "cut", whole.substr(0, size));
    error_of([&] { load_safetensors(folder / "cut"); });
  }
  write_bytes(folder / "cut", whole);
  EXPECT_EQ(load_safetensors(folder / "cut").tensors.size(), 2U);
}

TEST(Safetensors, AHeaderOfMoreThan100MegabytesIsRefusedUnread) {
  const TemporaryFolder folder;
  write_bytes(folder / "bad", file_of("{", "", 100'000'001));
  std::filesystem::resize_file(folder / "bad", 200'000'000);  // sparse: takes no space
  EXPECT_TRUE(mentions(error_of([&] { load_safetensors(folder / "bad"); }),
                       "claims a header of 100000001 bytes, expected at most 100000000"));
}

TEST(Safetensors, LongNamesAndControlCharactersDoNotFloodTheMessage) {
  const TemporaryFolder folder;
  write_bytes(folder / "bad", file_of(R"({"a\nb)" + std::string(10000, 'x') + R"(":1})", ""));
  const std::string message = error_of([&] { load_safetensors(folder / "bad"); });
  EXPECT_TRUE(mentions(message, "tensor 'a?bxxx"));
  EXPECT_LT(message.size(), 1000U);
}

TEST(Safetensors, WhatIsNoFileIsRefused) {
  const TemporaryFolder folder;
  EXPECT_TRUE(mentions(error_of([] { load_safetensors("/nowhere/model.safetensors"); }),
                       "/nowhere/model.safetensors: does not exist"));
  EXPECT_TRUE(mentions(error_of([&] { load_safetensors(folder.string()); }), "it is a folder, expected a file"));
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_TRUE(mentions(error_of([&] { load_safetensors(folder / "pipe"); }), "it is no regular file"));
}

TEST(Safetensors, WhatTheFormatCannotHoldIsRefusedByNameAndTheOldFileStays) {
  const TemporaryFolder folder;
  save_safetensors(folder / "file", {{"x", torch::ones({2})}});
  const std::string before = read_bytes(folder / "file");
  const auto refusal = [&](const std::map<std::string, torch::Tensor>& tensors,
                           const std::map<std::string, std::string>& metadata = {}) {
    const std::string message = error_of([&] { save_safetensors(folder / "file", tensors, metadata); });
    EXPECT_TRUE(mentions(message, "safetensors file " + (folder / "file").string()));
    EXPECT_EQ(read_bytes(folder / "file"), before);
    EXPECT_FALSE(std::filesystem::exists(folder / "file.tmp"));
    return message;
  };
  const torch::Tensor one = torch::ones({1});
  EXPECT_TRUE(mentions(refusal({{"z", one.to(torch::kComplexDouble)}}), "tensor 'z' has dtype ComplexDouble"));
  EXPECT_TRUE(mentions(refusal({{"z", torch::Tensor()}}), "tensor 'z' is undefined"));
  EXPECT_TRUE(mentions(refusal({{"z", one.to_sparse()}}), "tensor 'z' has layout Sparse"));
  EXPECT_TRUE(mentions(refusal({{"z", one.to(torch::kMeta)}}), "tensor 'z' is on the meta device"));
  EXPECT_TRUE(mentions(refusal({{"__metadata__", one}}), "the format keeps for its metadata"));
  EXPECT_TRUE(mentions(refusal({{"\xC3(", one}}), "is not valid UTF-8"));
  EXPECT_TRUE(mentions(refusal({{"x", one}}, {{"k", "\xFF"}}), "the metadata text"));
  EXPECT_TRUE(mentions(refusal({{"x", one}}, {{"\xFF", "t"}}), "the metadata key"));
}

TEST(Safetensors, AFullDiskLeavesTheOldFile) {
  const TemporaryFolder folder;
  save_safetensors(folder / "file", {{"x", torch::ones({2})}});
  const std::string before = read_bytes(folder / "file");
  const auto old_action = signal(SIGXFSZ, SIG_IGN);
  rlimit limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlimit small = {4096, limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string message = error_of([&] { save_safetensors(folder / "file", {{"x", torch::ones({5000})}}); });
  setrlimit(RLIMIT_FSIZE, &limit);
  signal(SIGXFSZ, old_action);
  EXPECT_TRUE(mentions(message, "file: cannot be written: "));
  EXPECT_EQ(read_bytes(folder / "file"), before);
  EXPECT_FALSE(std::filesystem::exists(folder / "file.tmp"));
}

TEST(Safetensors, AFolderThatIsMissingIsNamed) {
  const TemporaryFolder folder;
  EXPECT_TRUE(
      mentions(error_of([&] { save_safetensors(folder / "gone" / "file", {}); }), "cannot be written: No such"));
}

/// Writes the index and two shards, a in the first and b in the second.
void write_shards(const TemporaryFolder& folder, const std::string& index) {
  save_safetensors(folder / "1.safetensors", {{"a", torch::ones({2})}, {"more", torch::ones({9})}});
  save_safetensors(folder / "2.safetensors", {{"b", torch::zeros({3}, torch::kHalf)}});
  write_bytes(folder / "model.safetensors.index.json", index);
}

TEST(ShardedSafetensors, AreReadAsTheIndexSays) {
  const TemporaryFolder folder;
  write_shards(folder, R"({"metadata":{"total_size":14,"x":[{"y":null}]},)"
                       R"("weight_map":{"a":"1.safetensors","b":"2.safetensors"},"more":-1.5,"less":-1,"and":true})");
  const Safetensors content = load_sharded(folder.string());
  ASSERT_EQ(content.tensors.size(), 2U);
  EXPECT_TRUE(content.tensors.at("a").equal(torch::ones({2})));
  EXPECT_TRUE(content.tensors.at("b").equal(torch::zeros({3}, torch::kHalf)));
}

TEST(ShardedSafetensors, OpeningTellsWhichFileHasWhat) {
  const TemporaryFolder folder;
  write_shards(folder, R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})");
  Checkpoint checkpoint = open_checkpoint(folder.string());
  EXPECT_TRUE(checkpoint.is_sharded);
  ASSERT_EQ(checkpoint.files.size(), 2U);
  EXPECT_EQ(checkpoint.files[1].name, "2.safetensors");
  EXPECT_EQ(checkpoint.files[1].tensors, std::vector<std::string>{"b"});
  EXPECT_EQ(checkpoint.files[1].file.info("b").dtype, torch::kHalf);

  const TemporaryFolder other;
  save_safetensors(other / "model.safetensors", {{"a", torch::ones({2})}, {"b", torch::ones({3})}});
  checkpoint = open_checkpoint(other.string());
  EXPECT_FALSE(checkpoint.is_sharded);
  ASSERT_EQ(checkpoint.files.size(), 1U);
  EXPECT_EQ(checkpoint.files[0].name, "model.safetensors");
  EXPECT_EQ(checkpoint.files[0].tensors, (std::vector<std::string>{"a", "b"}));
}

TEST(ShardedSafetensors, ShardsMayLieBelowTheFolderOrBehindLinks) {
  const TemporaryFolder folder;
  std::filesystem::create_directory(folder / "sub");
  save_safetensors(folder / "sub" / "blob", {{"a", torch::ones({2})}});
  std::filesystem::create_symlink("sub/blob", folder / "link");
  write_bytes(folder / "model.safetensors.index.json", R"({"weight_map":{"a":"link"}})");
  EXPECT_EQ(load_sharded(folder.string()).tensors.size(), 1U);
  write_bytes(folder / "model.safetensors.index.json", R"({"weight_map":{"a":"sub/blob"}})");
  EXPECT_EQ(load_sharded(folder.string()).tensors.size(), 1U);
}

TEST(ShardedSafetensors, AFolderOfOneFileNeedsNoIndex) {
  const TemporaryFolder folder;
  save_safetensors(folder / "model.safetensors", {{"a", torch::ones({2})}}, {{"format", "pt"}});
  const Safetensors content = load_sharded(folder.string());
  EXPECT_EQ(content.tensors.count("a"), 1U);
  EXPECT_EQ(content.metadata.at("format"), "pt");
}

TEST(ShardedSafetensors, TheWholeFileCountsBeforeAnIndex) {  // as in transformers
  const TemporaryFolder folder;
  write_shards(folder, R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})");
  save_safetensors(folder / "model.safetensors", {{"c", torch::ones({2})}});
  const Checkpoint checkpoint = open_checkpoint(folder.string());
  EXPECT_FALSE(checkpoint.is_sharded);
  ASSERT_EQ(checkpoint.files.size(), 1U);
  EXPECT_EQ(checkpoint.files[0].tensors, std::vector<std::string>{"c"});
}

TEST(ShardedSafetensors, AFolderWithoutThemIsToldWhatItHas) {
  const TemporaryFolder folder;
  const auto message = [&] { return error_of([&] { load_sharded(folder.string()); }); };
  EXPECT_TRUE(
      mentions(message(), folder.string() + ": has neither model.safetensors nor model.safetensors.index.json"));
  write_bytes(folder / "adapter_model.safetensors", "");
  write_bytes(folder / "config.json", "{}");
  EXPECT_TRUE(mentions(message(), "; there is 'adapter_model.safetensors', which is read under another name only"));
  write_bytes(folder / "pytorch_model.bin", "");
  EXPECT_TRUE(mentions(message(), "; there is 'adapter_model.safetensors', 'pytorch_model.bin'. A .bin file is"));
  for (const char* name : {"1.pt", "2.pt", "3.pt"}) write_bytes(folder / name, "");
  EXPECT_TRUE(mentions(message(), "'1.pt', '2.pt', '3.pt', 'adapter_model.safetensors', …. A .bin file is"));
  EXPECT_TRUE(mentions(error_of([&] { load_sharded((folder / "gone").string()); }), "gone: does not exist"));
  EXPECT_TRUE(mentions(error_of([&] { load_sharded((folder / "1.pt").string()); }), "1.pt: is no folder"));
  write_bytes(folder / "model-00002-of-00002.safetensors", "");
  write_bytes(folder / "model-00001-of-00002.safetensors", "");
  EXPECT_TRUE(mentions(message(),
                       "has shards, such as 'model-00001-of-00002.safetensors', but no "
                       "model.safetensors.index.json"));
  std::filesystem::create_symlink("cleaned-from-the-cache", folder / "model.safetensors");
  EXPECT_TRUE(mentions(message(), "'model.safetensors' is a symbolic link to a file that is not there"));
}

class BadShardIndex : public testing::TestWithParam<Damage> {};

TEST_P(BadShardIndex, IsRefusedWithItsNameAndTheReason) {
  const TemporaryFolder folder;
  write_shards(folder, GetParam().bytes);
  const std::string message = error_of([&] { load_sharded(folder.string()); });
  EXPECT_TRUE(mentions(message, folder.string()));
  EXPECT_TRUE(mentions(message, GetParam().message));
}

std::string map_to(const std::string& shard) { return R"({"weight_map":{"a":")" + shard + R"("}})"; }

INSTANTIATE_TEST_SUITE_P(
    Kinds, BadShardIndex,
    testing::Values(
        Damage{"Empty", "", "is not valid JSON at byte"}, Damage{"NoObject", "[]", "its content is a list"},
        Damage{"Number", "1", "its content is 1"}, Damage{"NoMap", R"({"metadata":{}})", "has no weight_map"},
        Damage{"MapBelow", R"({"metadata":{"weight_map":{"a":"1.safetensors"}}})", "has no weight_map"},
        Damage{"MapNoObject", R"({"weight_map":["a"]})", "weight_map is a list, expected an object"},
        Damage{"MapNull", R"({"weight_map":null})", "weight_map is null, expected an object"},
        Damage{"MapNumber", R"({"weight_map":-1})", "weight_map is -1, expected an object"},
        Damage{"MapTrue", R"({"weight_map":true})", "weight_map is true, expected an object"},
        Damage{"MapTwice", R"({"weight_map":{},"weight_map":{}})", "names 'weight_map' twice"},
        Damage{"ShardNoText", R"({"weight_map":{"a":3}})", "the shard of tensor 'a' is 3, expected a file name"},
        Damage{"ShardObject", R"({"weight_map":{"a":{}}})", "the shard of tensor 'a' is an object"},
        Damage{"ShardList", R"({"weight_map":{"a":[]}})", "the shard of tensor 'a' is a list"},
        Damage{"TensorTwice", R"({"weight_map":{"a":"1.safetensors","a":"2.safetensors"}})", "names 'a' twice"},
        Damage{"Deep", R"({"metadata":)" + std::string(1000000, '['), "is nested more than 16 deep"},
        Damage{"ShardMissing", map_to("3.safetensors"), "3.safetensors: does not exist"},
        Damage{"ShardLacksTensor", map_to("2.safetensors"), "2.safetensors: has no tensor 'a'"},
        Damage{"ShardAbove", map_to("../x/1.safetensors"), "names the shard '../x/1.safetensors', expected"},
        Damage{"ShardAboveWithin", map_to("sub/../../1.safetensors"), "names the shard"},
        Damage{"ShardAbsolute", map_to("/1.safetensors"), "names the shard '/1.safetensors', expected"},
        Damage{"ShardEmpty", map_to(""), "names the shard '', expected"},
        Damage{"ShardFolder", map_to("sub/"), "names the shard 'sub/', expected"},
        Damage{"ShardDot", map_to("."), "names the shard '.', expected"},
        Damage{"ShardNullByte", map_to("1.safetensors\\u0000x"), "names the shard '1.safetensors?x', expected"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lora_rite::test
