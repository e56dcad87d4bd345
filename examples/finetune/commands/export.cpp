#include "commands/export.hpp"

#include <torch/types.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <lora_rite/checkpoint.hpp>
#include <lora_rite/io/peft.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "common/dtypes.hpp"
#include "common/error.hpp"
#include "common/files.hpp"
#include "common/new_folder.hpp"
#include "data/dataset.hpp"
#include "models/config.hpp"
#include "models/load_model.hpp"
#include "training/run_options.hpp"
#include "workloads/language_workload.hpp"
#include "workloads/sentence_workload.hpp"

namespace finetune {
namespace {

namespace fs = std::filesystem;

RunOptions read_run(const ExportOptions& options) {
  const fs::path path = options.run / "run.json";
  if (!fs::exists(path)) {
    fail(path.string(), ": does not exist; --run is the --out folder of 'finetune train', or of an interrupted one");
  }
  RunOptions run;
  try {
    run = read_json(path).get<RunOptions>();
  } catch (const nlohmann::json::exception& error) {
    fail(path.string(), ": is not the record of a run (", error.what(), "); name another folder by --run");
  }
  if (!options.model.empty()) run.model = options.model.string();
  run.device = "cpu";
  return run;
}

// The run's model as it started. Of the data only the names of the classes are needed, and no examples but one where
// none would be an error.
std::unique_ptr<Workload> model_at_start(const RunOptions& run) {
  if (read_model_type(fs::path(run.model) / "config.json") == "bert") {
    TaskData task;
    task.classes = find_classes(read_tsv(run.train), run.train);
    return std::make_unique<SentenceWorkload>(run, load_bert(run.model), std::move(task));
  }
  LanguageData data;
  data.train.push_back({{0}, {0}, {}});
  const auto dtype = parse_dtype("run.json: dtype", run.dtype);
  return std::make_unique<LanguageWorkload>(run, load_model(run.model, dtype), std::move(data));
}

// A PiSSA start is the base's, a head's classes are the training file's.
void check_model(const fs::path& checkpoint, const Workload& workload) {
  RunIdentity saved;
  for (const RunPart& part : workload.identity()) {
    if (part.is_saved) saved.push_back(part);
  }
  const RunDifference found = compare(saved, lora_rite::load_checkpoint_values(checkpoint));
  if (!found.text.empty()) {
    fail(checkpoint.string(), ": the run was begun with something else (", found.text,
         "); name its base by --model, or restore the file");
  }
}

// The adapter that the run would write now goes to `folder`. Returns the number of steps it was trained.
int64_t save_last(const RunOptions& run, const fs::path& checkpoint, const fs::path& folder) {
  const std::unique_ptr<Workload> workload = model_at_start(run);
  check_model(checkpoint, *workload);
  const int64_t step = lora_rite::load_checkpoint_tensors(checkpoint, lora_rite::trained_tensors(workload->model()));
  workload->save(folder);
  return step;
}

}  // namespace

void export_adapter(const ExportOptions& options, std::ostream& log) {
  if (options.from != "last" && options.from != "best") fail("--from ", options.from, ": expected last or best");
  const auto dtype = options.dtype.empty() ? torch::kFloat : parse_dtype("--dtype", options.dtype);
  const RunOptions run = read_run(options);
  const bool is_last = options.from == "last";
  const fs::path best = options.run / "best";
  if (!is_last && !fs::exists(best / "adapter_config.json")) {
    fail(best.string(), ": holds no adapter; the run measured nothing on --validation yet, so use --from last");
  }
  NewFolder folder(options.out);
  std::string what = "the best measurement";
  if (is_last) what = concat("step ", save_last(run, options.run / "checkpoint.pt", folder.inside()));
  const fs::path source = is_last ? folder.inside() : best;
  lora_rite::Adapter adapter = lora_rite::load_adapter(source);
  for (auto& [name, tensor] : adapter.tensors) tensor = tensor.to(dtype);
  lora_rite::save_adapter(folder.inside(), adapter);
  if (!is_last && fs::exists(best / kHeadFile)) fs::copy_file(best / kHeadFile, folder.inside() / kHeadFile);
  folder.finish();
  log << concat("The adapter of ", what, " is in ", options.out.string(), "\n");
}

void add_export_command(CLI::App& app, std::function<int()>& action) {
  CLI::App* command = app.add_subcommand(
      "export", "Write the adapter of a training run as Python's PEFT reads it, also of a run that was interrupted");
  const auto options = std::make_shared<ExportOptions>();
  command->add_option("--run", options->run, "The --out folder of 'finetune train'")->required()->type_name("DIR");
  command->add_option("--from", options->from, "last or best")->capture_default_str();
  command->add_option("--model", options->model, "Folder of the base model")
      ->default_str("as in the run")
      ->type_name("DIR");
  command->add_option("--dtype", options->dtype, "Dtype of the factors: " + join(dtype_names()))
      ->default_str("float32");
  command->add_option("--out", options->out, "Folder to be made")->required()->type_name("DIR");
  command->footer(
      "\n"
      "--from last takes the weights of checkpoint.pt: what the run would have saved, had it ended there.\n"
      "--from best takes those of the best measurement on --validation. A classifier's head comes along.\n"
      "\n"
      "Example:\n"
      "  finetune export --run runs/arc --from best --dtype bfloat16 --out arc-adapter\n");
  command->callback([options, &action] {
    action = [options] {
      export_adapter(*options, std::cout);
      return 0;
    };
  });
}

}  // namespace finetune
