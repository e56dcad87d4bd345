// The Python package's native module: LoraRiteBase with Python's tensors and options. It computes nothing.
//
// What crosses the border, beside tensors: options as dicts by name, factor pairs as tuples (name, a, b, experts), and
// the optimizer's archive as nested dicts of tensors and plain values. Other threads of Python run while an archive is
// written, read or loaded, as in a step; not while a dict is walked.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <pybind11/functional.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/optim/adamw.h>
#include <torch/serialize/archive.h>
#include <torch/version.h>

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora_rite/diagnostics.hpp"
#include "lora_rite/io/files.hpp"
#include "lora_rite/leaf.hpp"
#include "lora_rite/names.hpp"
#include "lora_rite/optimizer.hpp"
#include "lora_rite/options.hpp"
#include "lora_rite/version.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace lora_rite {
namespace {

// --- Options -------------------------------------------------------------------------------------------------------

/// The engines by their names in Python, in the order of `Engine`.
constexpr std::array<const char*, 4> kEngines = {"automatic", "device", "host", "cuda"};

/// Calls f(name, value) for every option.
template <class Function>
void for_each_option(LoraRiteOptions& options, const Function& f) {
  LoraRiteOptions::for_each_saved(options, f);
  f("engine", options.engine());
  f("capturable", options.capturable());
}
template <class Function>
void for_each_option(torch::optim::AdamWOptions& options, const Function& f) {
  f("lr", options.lr());
  f("betas", options.betas());
  f("eps", options.eps());
  f("weight_decay", options.weight_decay());
  f("amsgrad", options.amsgrad());
}

template <class Value>
py::object to_python(const Value& value) {
  if constexpr (std::is_same_v<Value, Engine>) {
    return py::str(kEngines.at(static_cast<size_t>(value)));
  } else {
    return py::cast(value);
  }
}

/// Takes over a value from Python; false if it has not the right type.
template <class Value>
bool from_python(const py::handle& found, Value& value) {
  if constexpr (std::is_same_v<Value, Engine>) {
    for (size_t i = 0; i < kEngines.size(); ++i) {
      if (!py::str(kEngines[i]).equal(found)) continue;
      value = static_cast<Engine>(i);
      return true;
    }
    return false;
  } else {
    py::detail::make_caster<Value> caster;
    // A flag must be one: anything is true or false in Python. Numbers are whatever becomes a float.
    if (!caster.load(found, /*convert=*/!std::is_same_v<Value, bool>)) {
      PyErr_Clear();
      return false;
    }
    value = py::detail::cast_op<Value>(caster);
    return true;
  }
}

template <class Value>
const char* expected_of() {
  if (std::is_same_v<Value, Engine>) return "'automatic', 'device', 'host' or 'cuda'";
  if (std::is_same_v<Value, bool>) return "True or False";
  return std::is_same_v<Value, double> ? "a number" : "a pair of numbers";
}

template <class Options>
py::dict dict_of(Options options) {
  py::dict result;
  for_each_option(options, [&](const char* name, auto& value) { result[name] = to_python(value); });
  return result;
}

/// `options` with the values of a dict; names that are no options, as a scheduler's initial_lr, are passed over.
template <class Options>
Options with_values(Options options, const py::dict& values) {
  for_each_option(options, [&](const char* name, auto& value) {
    using Value = std::decay_t<decltype(value)>;
    if (!values.contains(name)) return;
    const py::object found = values[name];
    if (!from_python(found, value)) {
      throw py::type_error(std::string(name) + " is " + py::repr(found).cast<std::string>() + ", expected " +
                           expected_of<Value>());
    }
  });
  return options;
}

// --- Archives ------------------------------------------------------------------------------------------------------

/// An archive as a dict of tensors, plain values and dicts; what an optimizer's has not is left out.
py::dict to_tree(torch::serialize::InputArchive& archive) {
  py::dict tree;
  for (const std::string& name : archive.keys()) {
    const py::str key(name);
    c10::IValue value;
    archive.read(name, value);
    if (value.isModule()) {
      torch::serialize::InputArchive entry;
      archive.read(name, entry);
      tree[key] = to_tree(entry);
    } else if (value.isTensor()) {
      tree[key] = py::cast(value.toTensor().detach());
    } else if (value.isBool()) {
      tree[key] = value.toBool();
    } else if (value.isInt()) {
      tree[key] = value.toInt();
    } else if (value.isDouble()) {
      tree[key] = value.toDouble();
    } else if (value.isString()) {
      tree[key] = value.toStringRef();
    } else if (value.isTuple()) {  // betas
      tree[key] = value.to<std::tuple<double, double>>();
    }
  }
  return tree;
}

/// The same the other way round.
void write_tree(torch::serialize::OutputArchive& archive, const py::dict& tree, const std::string& place) {
  for (const auto& [name, value] : tree) {
    const std::string key = name.cast<std::string>();
    if (py::isinstance<py::dict>(value)) {
      torch::serialize::OutputArchive entry(archive.compilation_unit());
      write_tree(entry, value.cast<py::dict>(), place + "['" + key + "']");
      archive.write(key, entry);
    } else if (THPVariable_Check(value.ptr())) {
      archive.write(key, value.cast<at::Tensor>().detach(), /*is_buffer=*/true);
    } else if (py::isinstance<py::bool_>(value)) {
      archive.write(key, c10::IValue(value.cast<bool>()));
    } else if (py::isinstance<py::int_>(value)) {
      archive.write(key, c10::IValue(value.cast<int64_t>()));
    } else if (py::isinstance<py::float_>(value)) {
      archive.write(key, c10::IValue(value.cast<double>()));
    } else if (py::isinstance<py::str>(value)) {
      archive.write(key, c10::IValue(value.cast<std::string>()));
    } else {
      std::tuple<double, double> numbers;
      TORCH_CHECK_TYPE(from_python(value, numbers), "load: ", place, "['", key, "'] is ",
                       py::repr(value).cast<std::string>(), ", expected a tensor, a number, a text or a dict");
      archive.write(key, c10::IValue(numbers));
    }
  }
}

/// What was written, to be read. Needs no GIL.
torch::serialize::InputArchive reread(torch::serialize::OutputArchive& written) {
  std::stringstream bytes;
  written.save_to(bytes);
  torch::serialize::InputArchive archive;
  archive.load_from(bytes);
  return archive;
}

torch::serialize::InputArchive to_archive(const py::dict& tree) {
  torch::serialize::OutputArchive archive;
  write_tree(archive, tree, "the state");
  const py::gil_scoped_release release;
  return reread(archive);
}

// --- The optimizer -------------------------------------------------------------------------------------------------

using Pair = std::tuple<std::string, at::Tensor, at::Tensor, int64_t>;  // name, a, b, experts

class NativeOptimizer : public LoraRiteBase {
 public:
  NativeOptimizer(const std::string& basis, const py::dict& defaults)
      : LoraRiteBase(basis_of(basis), with_values(LoraRiteOptions(), defaults), /*parts=*/false) {}

  /// Another group; returns the tensors of its param group.
  std::vector<at::Tensor> add_pairs_of(const std::vector<Pair>& wholes, const py::dict& options) {
    std::vector<FactorPair> pairs;
    for (const auto& [name, a, b, experts] : wholes) {
      if (experts == 1) {
        pairs.push_back({name, a, b});
      } else {
        for (FactorPair& pair : expert_pairs({name, a, b}, experts)) pairs.push_back(std::move(pair));
      }
    }
    add_pairs(std::move(pairs), with_values(LoraRiteOptions(), options));
    return param_groups().back().params();
  }

  void add_parameters_of(std::vector<at::Tensor> parameters, const py::dict& options, bool maximize) {
    add_parameters(std::move(parameters), with_values(torch::optim::AdamWOptions(), options), maximize);
  }

  void set_options(size_t group, const py::dict& values) {
    const std::string where = "LoraRite, group " + std::to_string(group);
    torch::optim::OptimizerOptions& own = param_groups().at(group).options();
    if (auto* adamw = dynamic_cast<torch::optim::AdamWOptions*>(&own)) {
      const auto changed = with_values(*adamw, values);
      detail::check_options_of_adam(changed, where);
      const bool ascend = values["maximize"].cast<bool>();
      TORCH_CHECK(ascend == ascends(group), where, ": maximize is ", ascend ? "True" : "False",
                  " of a group by AdamW, expected what it was when the group was added");
      *adamw = changed;
    } else {
      auto& rite = static_cast<LoraRiteOptions&>(own);
      const auto changed = with_values(rite, values);
      detail::check_options(changed, where);
      TORCH_CHECK(changed.engine() == rite.engine() || group >= placed_groups_, where, ": engine is '",
                  kEngines.at(static_cast<size_t>(changed.engine())), "' after the first step, expected '",
                  kEngines.at(static_cast<size_t>(rite.engine())),
                  "', with which it was taken; build the optimizer anew and load the state");
      rite = changed;
    }
  }

  py::dict options_of(size_t group) {
    torch::optim::OptimizerOptions& own = param_groups().at(group).options();
    const auto* adamw = dynamic_cast<torch::optim::AdamWOptions*>(&own);
    if (adamw == nullptr) return dict_of(static_cast<LoraRiteOptions&>(own));
    py::dict result = dict_of(*adamw);
    result["maximize"] = ascends(group);
    return result;
  }

  std::vector<std::string> pair_names(size_t group) const {
    std::vector<std::string> names;
    for (size_t i = 0; i < pairs_of(group).size(); ++i) {
      const std::string& name = pairs_of(group)[i].name;
      names.push_back(name.empty() ? label_of(group, i) : name);
    }
    return names;
  }

  py::dict tree() const {
    torch::serialize::InputArchive written = [this] {
      const py::gil_scoped_release release;
      torch::serialize::OutputArchive archive;
      save(archive);
      return reread(archive);
    }();
    return to_tree(written);
  }

  void load_tree(const py::dict& tree) {
    torch::serialize::InputArchive archive = to_archive(tree);
    const py::gil_scoped_release release;
    load(archive);
  }

  LoadReport load_matching_tree(const py::dict& tree, const std::function<std::string(const std::string&)>& rename,
                                bool other_parameters) {
    torch::serialize::InputArchive archive = to_archive(tree);
    const py::gil_scoped_release release;  // pybind11's function takes the GIL for each call and copy of `rename`
    return load_matching(archive, {rename, other_parameters});
  }

  /// An interruption leaves the old file or the new one.
  void save_file(const std::string& path) const {
    torch::serialize::OutputArchive archive;
    save(archive);
    lora_rite::detail::replace_file(path, "'" + path + "' ", [&](lora_rite::detail::FileWriter& file) {
      archive.save_to([&](const void* data, size_t size) {
        file.append(data, size);
        return size;
      });
    });
  }

  torch::Tensor step(LossClosure closure = nullptr) override {
    torch::Tensor loss = LoraRiteBase::step(std::move(closure));
    placed_groups_ = param_groups().size();
    return loss;
  }

  void load(torch::serialize::InputArchive& archive) override {
    LoraRiteBase::load(archive);
    placed_groups_ = param_groups().size();
  }

  /// Forgets everything, the choice of the engines as well.
  void reset_all() {
    reset_state();
    placed_groups_ = 0;
  }

 private:
  size_t placed_groups_ = 0;  ///< the first so many have their engines

  static engine::BasisFunctions basis_of(const std::string& name) {
    for (const auto& basis : {engine::BasisFunctions::of<PolarBasis>(), engine::BasisFunctions::of<QrBasis>()})
      if (name == basis.name) return basis;
    TORCH_CHECK(false, "basis is '", name, "', expected '", PolarBasis::name(), "' or '", QrBasis::name(), "'");
  }
};

py::dict read_file(const std::string& path) {
  torch::serialize::InputArchive archive;
  {
    const py::gil_scoped_release release;
    archive.load_from(path, at::Device(at::kCPU));
  }
  return to_tree(archive);
}

py::dict dict_of(const FactorState& state) {
  const auto tensor = [](const at::Tensor& t) { return t.defined() ? py::cast(t) : py::none(); };
  return py::dict("steps"_a = state.steps, "momentum"_a = tensor(state.momentum),
                  "second_moment"_a = tensor(state.second_moment), "inverse_root"_a = tensor(state.inverse_root),
                  "escaped_mass"_a = state.escaped_mass, "rows"_a = tensor(state.rows),
                  "master"_a = tensor(state.master));
}

py::object state_of(const LoraRiteBase& optimizer, const std::string& name) {
  const std::optional<StateOfPair> state = optimizer.state_of(name);
  if (!state) return py::none();
  return py::dict("a"_a = dict_of(state->a), "b"_a = dict_of(state->b));
}

/// The factor pairs among named parameters, as (name, index of a, index of b, experts).
std::vector<std::tuple<std::string, size_t, size_t, int64_t>> find_pairs(
    const std::vector<std::pair<std::string, at::Tensor>>& named_parameters) {
  torch::OrderedDict<std::string, at::Tensor> parameters;
  std::map<const void*, size_t> index_of;
  for (const auto& [name, tensor] : named_parameters) {
    TORCH_CHECK(!parameters.contains(name), "two parameters are called '", name, "', expected different names");
    index_of.emplace(tensor.unsafeGetTensorImpl(), parameters.size());
    parameters.insert(name, tensor);
  }
  std::vector<std::tuple<std::string, size_t, size_t, int64_t>> found;
  const auto index = [&](const at::Tensor& factor) { return index_of.at(factor.unsafeGetTensorImpl()); };
  for (const FactorPair& pair : find_factor_pairs(parameters)) {
    if (index_of.count(pair.a.unsafeGetTensorImpl()) > 0) {
      found.emplace_back(pair.name, index(pair.a), index(pair.b), 1);
      continue;
    }
    // Of experts: all of a layer, "name[0]", "name[1]", …, one after the other.
    const size_t a = index(lora_rite::detail::leaf_of(pair.a)), b = index(lora_rite::detail::leaf_of(pair.b));
    if (!found.empty() && std::get<1>(found.back()) == a) {
      ++std::get<3>(found.back());
    } else {
      found.emplace_back(pair.name.substr(0, pair.name.rfind('[')), a, b, 1);
    }
  }
  return found;
}

// --- Errors --------------------------------------------------------------------------------------------------------

/// What the library refuses is a ValueError with the sentence alone; without this it would carry a C++ backtrace.
void translate(std::exception_ptr error) {
  try {
    std::rethrow_exception(std::move(error));
  } catch (const c10::OutOfMemoryError& memory) {
    PyErr_SetString(py::module_::import("torch").attr("OutOfMemoryError").ptr(), memory.what_without_backtrace());
  } catch (const c10::TypeError& type) {
    PyErr_SetString(PyExc_TypeError, type.what_without_backtrace());
  } catch (const c10::Error& refused) {
    PyErr_SetString(PyExc_ValueError, refused.what_without_backtrace());
  }
}

std::string version() {
  return c10::str(LORA_RITE_VERSION_MAJOR, ".", LORA_RITE_VERSION_MINOR, ".", LORA_RITE_VERSION_PATCH);
}

}  // namespace
}  // namespace lora_rite

PYBIND11_MODULE(_native, module) {
  using namespace lora_rite;
  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::register_local_exception_translator(&translate);

  module.attr("__version__") = version();
  module.attr("torch_version") = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR);
  module.attr("options") = dict_of(LoraRiteOptions());
  module.attr("adamw_options") = dict_of(torch::optim::AdamWOptions());
  module.def("factor_names", &lora_rite::detail::known_factor_names);
  module.def("find_factor_pairs", &find_pairs, "named_parameters"_a);
  module.def("read_file", &read_file, "path"_a);
  module.def("kernel_name", &kernel_name);

  py::class_<DoubleSteps>(module, "DoubleSteps", py::module_local())
      .def_readonly("momentum_map", &DoubleSteps::momentum_map)
      .def_readonly("gradient_map", &DoubleSteps::gradient_map)
      .def_readonly("cross_product", &DoubleSteps::cross_product);
  py::class_<FactorDiagnostics>(module, "FactorDiagnostics", py::module_local())
      .def_readonly("condition_number", &FactorDiagnostics::condition_number)
      .def_readonly("unmagnified_gradient_norm", &FactorDiagnostics::unmagnified_gradient_norm)
      .def_readonly("escaped_mass", &FactorDiagnostics::escaped_mass)
      .def_readonly("effective_rank", &FactorDiagnostics::effective_rank)
      .def_readonly("update_rms", &FactorDiagnostics::update_rms)
      .def_readonly("in_double", &FactorDiagnostics::in_double)
      .def("__repr__", [](const FactorDiagnostics& factor) {
        return py::str("(condition {:.2g}, ‖Ḡ‖ {:.2g}, ρ {:.2g}, effective rank {:.1f}, update RMS {:.2g})")
            .format(factor.condition_number, factor.unmagnified_gradient_norm, factor.escaped_mass,
                    factor.effective_rank, factor.update_rms);
      });
  py::class_<PairDiagnostics>(module, "PairDiagnostics", py::module_local())
      .def_readonly("name", &PairDiagnostics::name)
      .def_readonly("a", &PairDiagnostics::a)
      .def_readonly("b", &PairDiagnostics::b)
      .def_readonly("clip_factor", &PairDiagnostics::clip_factor)
      .def_readonly("skipped_steps", &PairDiagnostics::skipped_steps)
      .def("__repr__", [](const PairDiagnostics& pair) {
        return py::str("'{}': a {}, b {}, clip factor {:.2g}, {} skipped steps")
            .format(pair.name, pair.a, pair.b, pair.clip_factor, pair.skipped_steps);
      });
  py::class_<LoadReport>(module, "LoadReport", py::module_local())
      .def_readonly("loaded", &LoadReport::loaded)
      .def_readonly("kept", &LoadReport::kept)
      .def_readonly("unused", &LoadReport::unused);

  py::class_<NativeOptimizer>(module, "Optimizer", py::module_local())
      .def(py::init<const std::string&, const py::dict&>(), "basis"_a, "defaults"_a)
      .def("add_pairs", &NativeOptimizer::add_pairs_of, "pairs"_a, "options"_a)
      .def("add_parameters", &NativeOptimizer::add_parameters_of, "parameters"_a, "options"_a, "maximize"_a)
      .def("set_options", &NativeOptimizer::set_options, "group"_a, "options"_a)
      .def("options_of", &NativeOptimizer::options_of, "group"_a)
      .def("pair_names", &NativeOptimizer::pair_names, "group"_a)
      .def(
          "step", [](NativeOptimizer& self) { self.step(); }, release_gil())
      .def("upload_rates", &NativeOptimizer::upload_rates, release_gil())
      .def("tree", &NativeOptimizer::tree)
      .def("load_tree", &NativeOptimizer::load_tree, "tree"_a)
      .def("load_matching", &NativeOptimizer::load_matching_tree, "tree"_a, "rename"_a, "other_parameters"_a)
      .def("save_file", &NativeOptimizer::save_file, "path"_a, release_gil())
      .def("skipped_steps", &NativeOptimizer::skipped_steps, release_gil())
      .def("diagnostics", &NativeOptimizer::diagnostics, release_gil())
      .def("state_of", [](const NativeOptimizer& self, const std::string& name) { return state_of(self, name); })
      .def(
          "reset_state",
          [](NativeOptimizer& self, const std::optional<std::string>& name) {
            name ? self.reset_state(*name) : self.reset_all();
          },
          "name"_a = py::none());
}
