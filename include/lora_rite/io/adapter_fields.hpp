#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lora_rite/io/json.hpp"
#include "lora_rite/module_names.hpp"

/// The fields of an adapter_config.json, one by one: from JSON, which is not trusted, and to it.
namespace lora_rite::detail {

/// Takes the fields of a description one by one out of a JSON object. A field that is not there leaves the default, as
/// in PEFT, whose versions differ in what they write. Throws c10::Error with the label and the field's name if one is
/// of another type.
class FieldReader {
 public:
  FieldReader(std::string label, nlohmann::json& fields) : label_(std::move(label)), fields_(fields) {}

  void read(const char* name, bool& value) {
    take(name, [&](const nlohmann::json& found) {
      check(found.is_boolean(), name, found, "true or false");
      value = found.get<bool>();
    });
  }

  void read(const char* name, int64_t& value) {
    take(name, [&](const nlohmann::json& found) { value = whole_number(name, found, 1); });
  }

  void read(const char* name, double& value) {
    take(name, [&](const nlohmann::json& found) { value = number(name, found); });
  }

  void read(const char* name, std::string& value) {
    take(name, [&](const nlohmann::json& found) {
      check(found.is_string(), name, found, "a text");
      value = found.get<std::string>();
    });
  }

  void read(const char* name, std::optional<std::string>& value) {
    take(name, [&](const nlohmann::json& found) {
      if (found.is_null()) return;
      check(found.is_string(), name, found, "a text or null");
      value = found.get<std::string>();
    });
  }

  void read(const char* name, std::variant<bool, std::string>& value) {
    take(name, [&](const nlohmann::json& found) {
      check(found.is_boolean() || found.is_string(), name, found, "true, false or a text");
      if (found.is_boolean()) {
        value = found.get<bool>();
      } else {
        value = found.get<std::string>();
      }
    });
  }

  void read(const char* name, ModuleNames& value) {
    take(name, [&](const nlohmann::json& found) {
      if (found.is_null()) return;
      check(found.is_string() || found.is_array(), name, found, "a text, a list of texts or null");
      if (found.is_string()) {
        value = found.get<std::string>();
      } else {
        value = texts(name, found);
      }
    });
  }

  void read(const char* name, std::optional<std::vector<std::string>>& value) {
    take(name, [&](const nlohmann::json& found) {
      if (!found.is_null()) value = texts(name, found);
    });
  }

  void read(const char* name, std::vector<int64_t>& value) {
    take(name, [&](const nlohmann::json& found) {
      if (found.is_null()) return;
      if (!found.is_array()) {  // one number stands for a list of it
        value = {whole_number(name, found, 0)};
        return;
      }
      for (const auto& element : found) value.push_back(whole_number(name, element, 0));
    });
  }

  void read(const char* name, std::map<std::string, int64_t>& value) {
    take(name, [&](const nlohmann::json& found) {
      for_each_entry(name, found, [&](const std::string& key, const std::string& place, const nlohmann::json& entry) {
        value.emplace(key, whole_number(place, entry, 1));
      });
    });
  }

  void read(const char* name, std::map<std::string, double>& value) {
    take(name, [&](const nlohmann::json& found) {
      for_each_entry(name, found, [&](const std::string& key, const std::string& place, const nlohmann::json& entry) {
        value.emplace(key, number(place, entry));
      });
    });
  }

 private:
  template <class Use>
  void take(const char* name, Use use) {
    const auto field = fields_.find(name);
    if (field == fields_.end()) return;
    use(*field);
    fields_.erase(field);
  }

  void check(bool condition, const std::string& name, const nlohmann::json& found, const char* expected) const {
    TORCH_CHECK(condition, label_, name, " is ", in_quotes(found.dump()), ", expected ", expected);
  }

  int64_t whole_number(const std::string& name, const nlohmann::json& found, int64_t least) const {
    const bool fits = found.is_number_unsigned() && found.get<uint64_t>() <= INT64_MAX && found.get<int64_t>() >= least;
    check(fits, name, found, least == 0 ? "a whole number ≥ 0" : "a whole number ≥ 1");
    return found.get<int64_t>();
  }

  double number(const std::string& name, const nlohmann::json& found) const {
    check(found.is_number(), name, found, "a number");
    return found.get<double>();
  }

  std::vector<std::string> texts(const std::string& name, const nlohmann::json& found) const {
    check(found.is_array(), name, found, "a list of texts");
    std::vector<std::string> result;
    for (const auto& element : found) {
      check(element.is_string(), name + "[" + std::to_string(result.size()) + "]", element, "a text");
      result.push_back(element.get<std::string>());
    }
    return result;
  }

  template <class Use>
  void for_each_entry(const std::string& name, const nlohmann::json& found, Use use) const {
    if (found.is_null()) return;
    check(found.is_object(), name, found, "an object or null");
    for (const auto& [key, entry] : found.items()) use(key, name + "[" + in_quotes(key) + "]", entry);
  }

  std::string label_;
  nlohmann::json& fields_;
};

/// Numbers that are whole are written as such: PEFT's lora_alpha is one.
inline nlohmann::json to_field(double value) {
  constexpr double kMostExact = 9007199254740992;  // 2⁵³
  if (std::trunc(value) == value && std::abs(value) <= kMostExact) return static_cast<int64_t>(value);
  return value;
}
inline nlohmann::json to_field(const std::map<std::string, double>& values) {
  nlohmann::json result = nlohmann::json::object();
  for (const auto& [key, value] : values) result[key] = to_field(value);
  return result;
}
inline nlohmann::json to_field(const ModuleNames& names) {
  if (const auto* text = std::get_if<std::string>(&names)) return *text;
  if (const auto* list = std::get_if<std::vector<std::string>>(&names)) return *list;
  return nullptr;
}
inline nlohmann::json to_field(const std::variant<bool, std::string>& value) {
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  return std::get<bool>(value);
}
template <class Value>
nlohmann::json to_field(const std::optional<Value>& value) {
  return value ? nlohmann::json(*value) : nlohmann::json();
}
inline nlohmann::json to_field(const std::vector<int64_t>& layers) {
  return layers.empty() ? nlohmann::json() : nlohmann::json(layers);
}
template <class Value>
nlohmann::json to_field(const Value& value) {
  return value;
}

}  // namespace lora_rite::detail
