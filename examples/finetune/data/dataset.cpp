#include "data/dataset.hpp"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <set>

#include "common/error.hpp"

namespace finetune {
namespace {

// Labels go into JSON, which holds nothing else.
bool is_utf8(const std::string& text) {
  try {
    return !nlohmann::json(text).dump().empty();
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

}  // namespace

std::vector<LabelledText> read_tsv(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file || std::filesystem::is_directory(path)) {
    fail(path.string(), ": cannot be read; a file of lines 'label TAB text' is expected");
  }
  std::vector<LabelledText> rows;
  std::string line;
  for (int64_t number = 1; std::getline(file, line); ++number) {
    if (number == 1 && line.compare(0, 3, "\xEF\xBB\xBF") == 0) line.erase(0, 3);
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.find_first_not_of(" \t") == std::string::npos) continue;
    const size_t tab = line.find('\t');
    if (tab == std::string::npos) {
      fail(path.string(), ":", number, ": has no tab; write the line as 'label TAB text'");
    }
    if (tab == 0) {
      fail(path.string(), ":", number, ": has no label before the tab; write the line as 'label TAB text'");
    }
    if (line.find_first_not_of(" \t", tab) == std::string::npos) {
      fail(path.string(), ":", number, ": has no text after the label '", line.substr(0, tab),
           "'; write the line as 'label TAB text'");
    }
    rows.push_back({line.substr(0, tab), line.substr(tab + 1), number});
  }
  if (rows.empty()) {
    fail(path.string(), ": holds no example; a file of lines 'label TAB text' is expected");
  }
  return rows;
}

std::vector<std::string> find_classes(const std::vector<LabelledText>& rows, const std::filesystem::path& path) {
  std::set<std::string> labels;
  for (const LabelledText& row : rows) {
    if (labels.insert(row.label).second && !is_utf8(row.label)) {
      fail(path.string(), ":", row.line, ": the label '", row.label, "' is not UTF-8; save the file in that encoding");
    }
  }
  if (labels.size() < 2) {
    fail(path.string(), ": all ", rows.size(), " lines have the label '", *labels.begin(),
         "'; a classifier needs two labels or more");
  }
  return {labels.begin(), labels.end()};
}

std::vector<int64_t> index_labels(const std::vector<LabelledText>& rows, const std::vector<std::string>& classes,
                                  const std::filesystem::path& path) {
  std::vector<int64_t> indices;
  indices.reserve(rows.size());
  for (const LabelledText& row : rows) {
    const auto found = std::lower_bound(classes.begin(), classes.end(), row.label);
    if (found == classes.end() || *found != row.label) {
      fail(path.string(), ":", row.line, ": the label '", row.label,
           "' does not occur in the training data, whose labels are ", join(classes),
           "; correct the line or train on examples of it");
    }
    indices.push_back(found - classes.begin());
  }
  return indices;
}

Batch make_batch(const Dataset& data, const std::vector<int64_t>& indices, int64_t pad_token) {
  size_t length = 0;
  for (const int64_t index : indices) length = std::max(length, data.tokens[index].size());
  const auto rows = static_cast<int64_t>(indices.size());
  const auto columns = static_cast<int64_t>(length);
  Batch batch{torch::full({rows, columns}, pad_token, torch::kLong), torch::zeros({rows, columns}, torch::kBool),
              torch::empty({rows}, torch::kLong)};
  auto* tokens = batch.tokens.data_ptr<int64_t>();
  auto* mask = batch.mask.data_ptr<bool>();
  auto* labels = batch.labels.data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<int64_t>& sentence = data.tokens[indices[row]];
    std::copy(sentence.begin(), sentence.end(), tokens + row * columns);
    std::fill_n(mask + row * columns, sentence.size(), true);
    labels[row] = data.labels[indices[row]];
  }
  return batch;
}

BatchOrder::BatchOrder(int64_t size, int64_t batch, uint64_t seed)
    : size_(size), batch_(batch), seed_(seed), order_(size) {}

std::vector<int64_t> BatchOrder::indices(int64_t step) {
  std::vector<int64_t> result;
  result.reserve(batch_);
  for (int64_t position = step * batch_; position < (step + 1) * batch_; ++position) {
    if (position / size_ != epoch_) shuffle(position / size_);
    result.push_back(order_[position % size_]);
  }
  return result;
}

void BatchOrder::shuffle(int64_t epoch) {
  epoch_ = epoch;
  std::iota(order_.begin(), order_.end(), 0);
  std::seed_seq sequence{static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32),
                         static_cast<uint32_t>(epoch)};
  std::mt19937_64 random(sequence);
  // Fisher-Yates by hand: std::shuffle's order differs between standard libraries. The modulo's bias
  // is below size / 2^64.
  for (int64_t last = size_ - 1; last > 0; --last) {
    std::swap(order_[last], order_[random() % static_cast<uint64_t>(last + 1)]);
  }
}

std::vector<std::vector<int64_t>> batches_by_length(const Dataset& data, int64_t batch) {
  std::vector<int64_t> order(data.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t left, int64_t right) { return data.tokens[left].size() < data.tokens[right].size(); });
  std::vector<std::vector<int64_t>> batches;
  for (int64_t begin = 0; begin < data.size(); begin += batch) {
    const int64_t end = std::min(begin + batch, data.size());
    batches.emplace_back(order.begin() + begin, order.begin() + end);
  }
  return batches;
}

}  // namespace finetune
