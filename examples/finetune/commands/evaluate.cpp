#include "commands/evaluate.hpp"

#include <ATen/Parallel.h>
#include <torch/types.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "adapters/adapted_model.hpp"
#include "cli/options.hpp"
#include "common/dtypes.hpp"
#include "common/error.hpp"
#include "common/files.hpp"
#include "data/dataset.hpp"
#include "data/tokenize.hpp"
#include "evaluation/evaluate.hpp"
#include "evaluation/measure.hpp"
#include "models/config.hpp"
#include "reports/table.hpp"
#include "workloads/language_workload.hpp"
#include "workloads/sentence_workload.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

// What was measured on one file.
struct Result {
  fs::path data;
  std::string task;
  int64_t examples = 0;
  Scores scores;
  std::vector<std::string> texts;  // that the model wrote
};

// A folder for files that others read or write meanwhile; gone with it.
class Scratch {
 public:
  Scratch() {
    std::string pattern = (fs::temp_directory_path() / "finetune-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) {
      fail(pattern, ": no temporary folder can be made there; set TMPDIR to a folder you can write to");
    }
    path_ = pattern;
  }
  ~Scratch() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
};

void check_values(const EvaluateOptions& options, bool is_classifier) {
  require(!options.data.empty(), "--data", "", "at least one file");
  require(options.generate >= 0, "--generate", options.generate, "at least 0");
  require(options.batch >= 1, "--batch", options.batch, "at least 1");
  require(options.max_length >= 3, "--max-length", options.max_length, "at least 3: two special tokens and a word");
  require(options.threads >= 0 && options.threads <= kMaxThreads, "--threads", options.threads, "0 to 1024");
  require(options.dtype == "float32" || options.dtype == "bfloat16", "--dtype", options.dtype, "float32 or bfloat16");
  require(options.device == "cpu" || options.device == "cuda", "--device", options.device, "cpu or cuda");
  check_device(options.device);
  if (!options.texts.empty() && options.generate == 0) {
    fail("--texts ", options.texts.string(), ": nothing is written without --generate; give the number of tokens");
  }
  check_place("--out", options.out);
  check_place("--texts", options.texts);
  const EvaluateOptions defaults;
  if (!is_classifier) {
    if (options.max_length != defaults.max_length) {
      fail("--max-length ", options.max_length, ": prepare_tasks.py has cut a language model's texts; leave it out");
    }
    return;
  }
  const char* reason = ": a sentence classifier (model_type bert) has no such option; leave it out";
  if (options.batch != defaults.batch) fail("--batch ", options.batch, reason);
  if (options.generate > 0) fail("--generate", reason);
  if (options.dtype != "float32") fail("--dtype ", options.dtype, reason);
}

std::vector<Result> measure_language(const EvaluateOptions& options) {
  const TaskReading reading = reading_of(options.model / "config.json");
  std::vector<LanguageTest> tests;  // all of them are looked at before the model is loaded
  for (const fs::path& data : options.data) {
    tests.push_back(read_language_test(data, reading));
    if (options.generate > 0 && tests.back().has_choices()) {
      fail("--generate ", options.generate, ": ", data.string(),
           " has choices, after which there is nothing to write; ", "leave it out, or measure that file by itself");
    }
  }
  const TokenizerOptions tokenizer{options.model, options.max_length, options.python};
  const Scratch scratch;
  if (options.generate > 0) decode_tokens({{0}}, tokenizer, scratch / "tried");  // rather now than after the work
  const auto model = load_adapted_language_model(options.model, options.adapter, parse_dtype("--dtype", options.dtype),
                                                 torch::Device(options.device));
  std::vector<Result> results;
  for (size_t index = 0; index < tests.size(); ++index) {
    Result result{
        options.data[index], tests[index].task, tests[index].size(), measure(*model, tests[index], options.batch), {}};
    if (options.generate > 0) {
      const Scores written = measure_generation(*model, tests[index], options.batch, options.generate, tokenizer,
                                                scratch / "generated", {}, &result.texts);
      result.scores.insert(result.scores.end(), written.begin(), written.end());
    }
    results.push_back(std::move(result));
  }
  return results;
}

std::vector<Result> measure_classifier(const EvaluateOptions& options) {
  // All of them are looked at before one is tokenised, and all are tokenised before the model is loaded.
  std::vector<std::vector<LabelledText>> texts;
  for (const fs::path& data : options.data) texts.push_back(read_tsv(data));
  const std::vector<std::string> classes = read_classes(options.model, options.adapter);
  for (size_t index = 0; index < texts.size(); ++index) index_labels(texts[index], classes, options.data[index]);
  const BertConfig config = BertConfig::from_file(options.model / "config.json");
  check_max_length(options.max_length, config);
  const TokenizerOptions tokenizer{options.model, options.max_length, options.python};
  const Scratch scratch;
  std::vector<Dataset> datasets;
  for (size_t index = 0; index < texts.size(); ++index) {
    datasets.push_back(
        tokenize_rows(texts[index], classes, options.data[index], tokenizer, config, scratch / "tokens"));
  }
  const TrainedClassifier classifier =
      load_adapted_classifier(options.model, options.adapter, torch::Device(options.device));
  std::vector<Result> results;
  for (size_t index = 0; index < datasets.size(); ++index) {
    results.push_back(
        {options.data[index], "classes", datasets[index].size(), evaluate(*classifier.model, datasets[index]), {}});
  }
  return results;
}

// One line a score: shares, which have an error, in percent.
std::string table_of(const std::vector<Result>& results) {
  Table table({"data", "task", "examples", "score", "value", "±"});
  for (const Result& result : results) {
    for (const auto& [name, value] : result.scores) {
      if (ends_with(name, "_error")) continue;
      const auto error = std::find_if(result.scores.begin(), result.scores.end(),
                                      [name = name](const auto& score) { return score.first == name + "_error"; });
      const bool is_share = error != result.scores.end();
      table.add({result.data.filename().string(), result.task, std::to_string(result.examples), name,
                 is_share ? fixed(100 * value, 2) + " %" : fixed(value, 4),
                 is_share ? fixed(100 * error->second, 2) : std::string()});
    }
  }
  return table.text();
}

}  // namespace

nlohmann::json evaluate_model(const EvaluateOptions& options, std::ostream& out) {
  const bool is_classifier = read_model_type(options.model / "config.json") == "bert";
  check_values(options, is_classifier);
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));
  const std::vector<Result> results = is_classifier ? measure_classifier(options) : measure_language(options);

  nlohmann::json list = nlohmann::json::array();
  for (const Result& result : results) {
    nlohmann::json entry = {{"data", result.data.string()}, {"task", result.task}, {"examples", result.examples}};
    for (const auto& [name, value] : result.scores) entry[name] = value;
    list.push_back(std::move(entry));
  }
  nlohmann::json report = {
      {"model", options.model.string()},
      {"adapter", options.adapter.empty() ? nlohmann::json() : nlohmann::json(options.adapter.string())},
      {"dtype", options.dtype},
      {"results", std::move(list)}};
  if (!options.out.empty()) write_json(options.out, report);
  if (!options.texts.empty()) {
    replace_file(options.texts, [&](std::ostream& file) {
      for (const Result& result : results) {
        for (size_t index = 0; index < result.texts.size(); ++index) {
          const nlohmann::json line = {
              {"data", result.data.string()}, {"record", index}, {"text", result.texts[index]}};
          file << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
        }
      }
    });
  }
  out << table_of(results);
  return report;
}

void add_evaluate_command(CLI::App& app, std::function<int()>& action) {
  CLI::App* command = app.add_subcommand("eval", "Measure a model, with or without an adapter, on one file or several");
  const auto options = std::make_shared<EvaluateOptions>();
  command->add_option("--model", options->model, "Folder of the model")->required()->type_name("DIR");
  command->add_option("--adapter", options->adapter, "Folder of a PEFT adapter")->type_name("DIR");
  command->add_option("--data", options->data, "What to measure on")->required()->type_name("FILE");
  command
      ->add_option("--generate", options->generate,
                   "Language model: write up to so many tokens after each prompt and score them, 0 = no")
      ->capture_default_str();
  command->add_option("--texts", options->texts, "With --generate: write the texts as JSON lines")->type_name("FILE");
  command->add_option("--batch", options->batch, "Language model: rows at a time")->capture_default_str();
  command
      ->add_option("--max-length", options->max_length,
                   "Classifier: tokens a text is cut to; give what the training was given")
      ->capture_default_str();
  command->add_option("--dtype", options->dtype, "Language model: float32 or bfloat16")->capture_default_str();
  command->add_option("--device", options->device, "cpu or cuda")->capture_default_str();
  command->add_option("--threads", options->threads, "CPU threads, 0 = LibTorch's default")->capture_default_str();
  command->add_option("--out", options->out, "Write all scores as JSON")->type_name("FILE.json");
  command->add_option("--python", options->python, "Interpreter with tokenizers")
      ->default_str("$FINETUNE_PYTHON, else python3");
  command->footer(
      "\n"
      "A language model is measured on files of prepare_tasks.py: texts give loss and perplexity, with --generate\n"
      "also ROUGE-L, exact match and GSM8K's numbers; questions with choices give acc, acc_norm and acc_bytes. Shares\n"
      "are in percent, with their standard errors.\n"
      "\n"
      "A sentence classifier (bert) is measured on TSV files of lines 'label TAB text': accuracy and loss. Its head\n"
      "comes from the adapter's folder, or from that of a merged model.\n"
      "\n"
      "Examples:\n"
      "  finetune eval --model .deps/smollm2 --data arc.jsonl piqa.jsonl\n"
      "  finetune eval --model .deps/smollm2 --adapter runs/gsm8k --data gsm8k-test.jsonl --generate 200 --out s.json\n"
      "  finetune eval --model .deps/minilm --adapter runs/reviews --data test.tsv\n");
  command->callback([options, &action] {
    action = [options] {
      evaluate_model(*options, std::cout);
      return 0;
    };
  });
}

}  // namespace finetune
