#include "evaluation/evaluate.hpp"

#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

#include "common/error.hpp"
#include "common/files.hpp"
#include "common/subprocess.hpp"
#include "data/batches.hpp"
#include "evaluation/scores.hpp"

namespace finetune {
namespace {

constexpr int kBadTokenizer = 3;  // exit code of decode_tokens.py

// Evaluation mode and no gradients, as long as it lives.
class Evaluating {
 public:
  explicit Evaluating(LanguageModel& model) : model_(model), was_training_(model.is_training()) { model.eval(); }
  ~Evaluating() { model_.train(was_training_); }
  Evaluating(const Evaluating&) = delete;
  Evaluating& operator=(const Evaluating&) = delete;

 private:
  const torch::NoGradGuard no_grad_;
  LanguageModel& model_;
  bool was_training_;
};

// Groups of at most `batch` of the indices below `lengths.size()`, from short to long.
std::vector<std::vector<int64_t>> sorted_batches(const std::vector<int64_t>& lengths, int64_t batch) {
  if (batch < 1) fail("batch is ", batch, "; it must be at least 1");
  const auto size = static_cast<int64_t>(lengths.size());
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t left, int64_t right) { return lengths[left] < lengths[right]; });
  std::vector<std::vector<int64_t>> batches;
  for (int64_t begin = 0; begin < size; begin += batch) {
    batches.emplace_back(order.begin() + begin, order.begin() + std::min(begin + batch, size));
  }
  return batches;
}

// A text that the model reads once, and the choices it answers for: they differ in their last token alone.
struct Row {
  TextRecord text;
  size_t record;
  std::vector<size_t> choices;
};

std::vector<Row> make_rows(const std::vector<ChoiceRecord>& records) {
  std::vector<Row> rows;
  for (size_t record = 0; record < records.size(); ++record) {
    const size_t first = rows.size();
    for (size_t choice = 0; choice < records[record].choices.size(); ++choice) {
      const std::vector<int64_t>& prompt = records[record].prompt(choice);
      const std::vector<int64_t>& completion = records[record].choices[choice];
      const auto same = std::find_if(rows.begin() + static_cast<int64_t>(first), rows.end(), [&](const Row& row) {
        return row.text.completion.size() == completion.size() && row.text.prompt == prompt &&
               std::equal(completion.begin(), completion.end() - 1, row.text.completion.begin());
      });
      if (same != rows.end()) {
        same->choices.push_back(choice);
      } else {
        rows.push_back({{prompt, completion, {}}, record, {choice}});
      }
    }
  }
  return rows;
}

}  // namespace

std::vector<std::vector<double>> choice_log_likelihoods(LanguageModel& model, const std::vector<ChoiceRecord>& records,
                                                        int64_t batch) {
  const Evaluating evaluating(model);
  const bool encoder_decoder = model.is_encoder_decoder();
  const torch::Device device = device_of(model);
  const std::vector<Row> rows = make_rows(records);
  std::vector<TextRecord> texts;
  for (const Row& row : rows) texts.push_back(row.text);
  std::vector<std::vector<double>> result;
  for (const ChoiceRecord& record : records) result.emplace_back(record.choices.size());

  for (const std::vector<int64_t>& indices : sorted_batches(record_lengths(texts, encoder_decoder), batch)) {
    const LanguageBatch input = make_language_batch(texts, indices, encoder_decoder, model.special_tokens(), device);
    torch::Tensor hidden = model.hidden_states(input.input);
    torch::Tensor labels = input.labels;
    if (!encoder_decoder) {
      hidden = hidden.slice(1, 0, -1);
      labels = labels.slice(1, 1);
    }
    // One after the other, row by row: [completion tokens, vocab].
    const torch::Tensor log_probabilities =
        model.logits(hidden.index({labels.ne(kNoLabel)})).to(torch::kFloat).log_softmax(1);
    // Every wanted one is named by its row above and its token, and they are read at once.
    std::vector<int64_t> at;
    std::vector<int64_t> tokens;
    int64_t begin = 0;
    for (const int64_t index : indices) {
      const auto length = static_cast<int64_t>(rows[index].text.completion.size());
      for (const size_t choice : rows[index].choices) {
        const std::vector<int64_t>& completion = records[rows[index].record].choices[choice];
        for (int64_t position = 0; position < length; ++position) at.push_back(begin + position);
        tokens.insert(tokens.end(), completion.begin(), completion.end());
      }
      begin += length;
    }
    const auto tensor = [&](const std::vector<int64_t>& values) {
      return torch::tensor(values, torch::kLong).to(device);
    };
    const torch::Tensor wanted = log_probabilities.index({tensor(at), tensor(tokens)}).cpu();
    const float* next = wanted.data_ptr<float>();
    for (const int64_t index : indices) {
      for (const size_t choice : rows[index].choices) {
        float sum = 0;
        for (size_t position = 0; position < rows[index].text.completion.size(); ++position) sum += *next++;
        result[rows[index].record][choice] = sum;
      }
    }
  }
  return result;
}

ChoiceScores score_choices(const std::vector<ChoiceRecord>& records,
                           const std::vector<std::vector<double>>& log_likelihoods) {
  if (records.empty() || records.size() != log_likelihoods.size()) {
    fail("there are ", log_likelihoods.size(), " log-likelihoods for ", records.size(), " records");
  }
  ChoiceScores scores;
  scores.count = static_cast<int64_t>(records.size());
  for (size_t record = 0; record < records.size(); ++record) {
    const auto is_right = [&](const auto& length) {
      const std::vector<double>& sums = log_likelihoods[record];
      for (const double sum : sums) {
        if (std::isnan(sum)) return sum;  // a model that has diverged prefers nothing
      }
      size_t best = 0;
      for (size_t choice = 1; choice < sums.size(); ++choice) {
        if (sums[choice] / length(choice) > sums[best] / length(best)) best = choice;
      }
      return static_cast<int64_t>(best) == records[record].answer ? 1.0 : 0.0;
    };
    scores.acc += is_right([](size_t) { return 1.0; });
    scores.acc_norm += is_right([&](size_t choice) { return static_cast<double>(records[record].characters[choice]); });
    scores.acc_bytes += is_right([&](size_t choice) { return static_cast<double>(records[record].bytes[choice]); });
  }
  for (double* mean : {&scores.acc, &scores.acc_norm, &scores.acc_bytes}) *mean /= static_cast<double>(scores.count);
  scores.acc_error = standard_error(scores.acc, scores.count);
  scores.acc_norm_error = standard_error(scores.acc_norm, scores.count);
  scores.acc_bytes_error = standard_error(scores.acc_bytes, scores.count);
  return scores;
}

CompletionLoss evaluate_completions(LanguageModel& model, const std::vector<TextRecord>& records, int64_t batch) {
  const Evaluating evaluating(model);
  const bool encoder_decoder = model.is_encoder_decoder();
  CompletionLoss result;
  for (const std::vector<int64_t>& indices : sorted_batches(record_lengths(records, encoder_decoder), batch)) {
    const LanguageBatch input =
        make_language_batch(records, indices, encoder_decoder, model.special_tokens(), device_of(model));
    result.loss += completion_loss(model, input).item<double>();
    result.tokens += input.completion_tokens;
  }
  result.loss /= static_cast<double>(result.tokens);
  result.perplexity = std::exp(result.loss);
  return result;
}

std::vector<std::vector<int64_t>> generate_completions(LanguageModel& model, const std::vector<TextRecord>& records,
                                                       int64_t batch, int64_t max_new_tokens) {
  const Evaluating evaluating(model);
  const std::vector<int64_t>& end = model.special_tokens().end;
  std::vector<int64_t> lengths;
  for (const TextRecord& record : records) lengths.push_back(static_cast<int64_t>(record.prompt.size()));
  std::vector<std::vector<int64_t>> result(records.size());
  for (const std::vector<int64_t>& indices : sorted_batches(lengths, batch)) {
    std::vector<const std::vector<int64_t>*> prompts;
    for (const int64_t index : indices) prompts.push_back(&records[index].prompt);
    const LanguageInput input =
        make_prompt_batch(prompts, model.is_encoder_decoder(), model.special_tokens(), device_of(model));
    const torch::Tensor made = model.generate(input, max_new_tokens).cpu().contiguous();
    for (size_t row = 0; row < indices.size(); ++row) {
      const int64_t* first = made.data_ptr<int64_t>() + static_cast<int64_t>(row) * made.size(1);
      result[indices[row]].assign(first, std::find_first_of(first, first + made.size(1), end.begin(), end.end()));
    }
  }
  return result;
}

std::vector<std::string> decode_tokens(const std::vector<std::vector<int64_t>>& ids, const TokenizerOptions& options,
                                       const std::filesystem::path& scratch) {
  const std::filesystem::path tokenizer = options.model / "tokenizer.json";
  std::filesystem::path input = scratch;
  input += ".ids";
  replace_file(input, [&](std::ostream& file) {
    for (const std::vector<int64_t>& text : ids) {
      for (const int64_t id : text) file << id << ' ';
      file << '\n';
    }
  });
  const std::string python = find_python(options.python);
  const int code = run_program({python, script_path("decode_tokens.py").string(), "--tokenizer", tokenizer.string(),
                                "--input", input.string(), "--output", scratch.string()});
  std::filesystem::remove(input);
  if (code == kBadTokenizer) fail(tokenizer.string(), ": is damaged or no tokenizer; fetch the model again");
  if (code != 0) {
    fail("decoding failed: '", python, " decode_tokens.py' ended with code ", code, code == 127 ? " (not found)" : "",
         "; it needs Python 3 with the package 'tokenizers' (name another interpreter with --python or ",
         "FINETUNE_PYTHON)");
  }
  std::istringstream lines(read_file(scratch));
  std::filesystem::remove(scratch);
  std::vector<std::string> texts;
  std::string line;
  while (std::getline(lines, line)) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!json.is_string()) fail(scratch.string(), ":", texts.size() + 1, ": is no text; run again");
    texts.push_back(json.get<std::string>());
  }
  if (texts.size() != ids.size()) {
    fail(scratch.string(), ": holds ", texts.size(), " texts where ", ids.size(), " were expected; run again");
  }
  return texts;
}

TextScores score_texts(const std::vector<TextRecord>& records, const std::vector<std::string>& texts,
                       const std::vector<std::string>& stops) {
  if (records.empty() || records.size() != texts.size()) {
    fail("there are ", texts.size(), " texts for ", records.size(), " records");
  }
  TextScores scores;
  scores.count = static_cast<int64_t>(records.size());
  for (size_t record = 0; record < records.size(); ++record) {
    const std::string text = cut_at(texts[record], stops);
    const std::vector<std::string>& references = records[record].references;
    scores.rouge_l += rouge_l(text, references);
    scores.exact_match += exact_match(text, references);
    scores.strict_number += number_match(text, references, NumberRule::Strict);
    scores.flexible_number += number_match(text, references, NumberRule::Flexible);
  }
  for (double* mean : {&scores.rouge_l, &scores.exact_match, &scores.strict_number, &scores.flexible_number}) {
    *mean /= static_cast<double>(scores.count);
  }
  return scores;
}

std::vector<std::string> stops_of(const std::string& task) {
  if (task == "gsm8k") return {"Question:", "</s>", "<|im_end|>"};
  return {};
}

}  // namespace finetune
