#pragma once

#if !__has_include(<nlohmann/json.hpp>)
#error "lora_rite/io/safetensors.hpp and peft.hpp need nlohmann-json, which the rest of the library does not"
#endif

#include <c10/util/Exception.h>

#include <cstddef>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/io/files.hpp"

/// JSON from files that are not trusted: nested no deeper than told, no key twice, no byte behind the end.
namespace lora_rite::detail {

/// What a reader of one kind of file sees, event by event; nothing is stored. Every event that a reader does not
/// override is refused, with its place.
class JsonReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  /// The label begins every message; `subject` stands behind it where the text as a whole is no JSON.
  explicit JsonReader(std::string label, std::string subject = "")
      : label_(std::move(label)), subject_(std::move(subject)) {}

  /// Sends itself the events of a text. Throws c10::Error with the label if it is no JSON.
  void read(const char* begin, const char* end) {
    // nlohmann-json takes a null byte for the end of the text.
    TORCH_CHECK(std::memchr(begin, 0, static_cast<size_t>(end - begin)) == nullptr, label_, subject_,
                "is not valid JSON: it holds a null byte");
    nlohmann::json::sax_parse(begin, end, this);
  }

  bool null() override { return refuse("null"); }
  bool boolean(bool value) override { return refuse(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return refuse(std::to_string(value)); }
  bool number_unsigned(number_unsigned_t value) override { return refuse(std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return refuse(text); }
  bool string(string_t& value) override { return refuse("the text " + in_quotes(value)); }
  bool binary(binary_t&) override { return refuse("binary data"); }
  bool start_object(size_t) override { return refuse("an object"); }
  bool key(string_t&) override { return true; }
  bool end_object() override { return true; }
  bool start_array(size_t) override { return refuse("a list"); }
  bool end_array() override { return true; }
  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) override {
    TORCH_CHECK(false, label_, subject_, "is not valid JSON at byte ", position);
  }

 protected:
  /// Where the parser stands and what is expected there, for messages: "tensor 'x': dtype" and "a text".
  virtual std::string place() const = 0;
  virtual std::string expectation() const = 0;

  const std::string& label() const { return label_; }

  /// Throws c10::Error that this was found at this place.
  [[noreturn]] bool refuse(const std::string& found) const {
    TORCH_CHECK(false, label_, place(), " is ", found, ", expected ", expectation());
  }

 private:
  std::string label_, subject_;
};

/// A text as a JSON value. Throws c10::Error with the label if it is no JSON, nested deeper than `max_depth`, or has a
/// key twice in one object.
inline nlohmann::json parse_json(const std::string& text, const std::string& label, int max_depth) {
  TORCH_CHECK(text.find('\0') == std::string::npos, label, "is not valid JSON: it holds a null byte");
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, Event event, nlohmann::json& value) {
    TORCH_CHECK(depth <= max_depth, label, "is nested more than ", max_depth, " deep");
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key) {
      const auto& name = value.get_ref<const std::string&>();
      TORCH_CHECK(keys.back().insert(name).second, label, "names ", in_quotes(name), " twice");
    }
    return true;
  };
  nlohmann::json result;
  try {
    result = nlohmann::json::parse(text, check);
  } catch (const nlohmann::json::parse_error& error) {
    TORCH_CHECK(false, label, "is not valid JSON at byte ", error.byte);
  } catch (const nlohmann::json::exception& error) {  // a number out of range
    TORCH_CHECK(false, label, "is not valid JSON: ", error.what());
  }
  return result;
}

}  // namespace lora_rite::detail
