#include "data/tokenize.hpp"

#include <algorithm>
#include <sstream>

#include "common/error.hpp"
#include "common/files.hpp"
#include "common/fingerprint.hpp"
#include "common/subprocess.hpp"

namespace finetune {
namespace {

constexpr int kBadTokenizer = 3;  // exit code of tokenize_text.py

// A cache is a line with the fingerprint, then one line of ids a text.
bool is_current(const std::filesystem::path& cache, const std::string& expected) {
  if (!std::filesystem::is_regular_file(cache)) return false;
  const std::string content = read_file(cache);
  return content.compare(0, expected.size() + 1, expected + "\n") == 0;
}

std::vector<std::vector<int64_t>> parse(const std::filesystem::path& cache, size_t count, int64_t vocab_size) {
  std::istringstream content(read_file(cache));
  std::string line;
  std::getline(content, line);  // the fingerprint
  std::vector<std::vector<int64_t>> sentences;
  while (std::getline(content, line)) {
    std::istringstream ids(line);
    std::vector<int64_t>& sentence = sentences.emplace_back();
    for (int64_t id = 0; ids >> id;) sentence.push_back(id);
    const bool valid = ids.eof() && !sentence.empty() && std::all_of(sentence.begin(), sentence.end(), [&](int64_t id) {
                         return id >= 0 && id < vocab_size;
                       });
    if (!valid) {
      fail(cache.string(), ":", sentences.size() + 1, ": is no list of token ids below ", vocab_size,
           "; the tokenizer.json belongs to another model, or the cache is damaged: delete it");
    }
  }
  if (sentences.size() != count) {
    fail(cache.string(), ": holds ", sentences.size(), " sentences where ", count,
         " were expected; delete it and run again");
  }
  return sentences;
}

}  // namespace

std::vector<std::vector<int64_t>> tokenize(const std::vector<std::string>& texts, const TokenizerOptions& options,
                                           int64_t vocab_size, const std::filesystem::path& cache) {
  const std::filesystem::path tokenizer = options.model / "tokenizer.json";
  std::string lines;
  for (const std::string& text : texts) lines += text + "\n";
  Fingerprint fingerprint;
  fingerprint.add(read_file(tokenizer));
  fingerprint.add(lines);
  const std::string key = concat(fingerprint.text(), " max_length=", options.max_length);
  if (!is_current(cache, key)) {
    std::filesystem::path input = cache;
    input += ".texts";
    replace_file(input, [&](std::ostream& file) { file << lines; });
    const std::vector<std::string> command = {find_python(options.python),
                                              script_path("tokenize_text.py").string(),
                                              "--tokenizer",
                                              tokenizer.string(),
                                              "--input",
                                              input.string(),
                                              "--output",
                                              cache.string(),
                                              "--max-length",
                                              std::to_string(options.max_length),
                                              "--header",
                                              key};
    const int code = run_program(command);
    std::filesystem::remove(input);
    if (code == kBadTokenizer) {
      fail(tokenizer.string(), ": is damaged or no tokenizer (its reader's words are above); fetch the model again");
    }
    if (code != 0) {
      fail("tokenising failed: '", command[0], " ", command[1], "' ended with code ", code,
           code == 127 ? " (not found)" : "", "; it needs Python 3 with the package 'tokenizers' (install it with '",
           command[0], " -m pip install tokenizers', or name another interpreter with --python or FINETUNE_PYTHON)");
    }
  }
  return parse(cache, texts.size(), vocab_size);
}

}  // namespace finetune
