#pragma once

#include <string>
#include <variant>
#include <vector>

namespace lora_rite {

/// Which modules are meant, by their full names ("encoder.0.query"): nothing said; one text, a regular expression
/// (Python's, as PEFT has them) that matches the whole name, or "all-linear"; or a list, each entry of which stands for
/// every module whose name is that or ends in "." and that.
using ModuleNames = std::variant<std::monostate, std::string, std::vector<std::string>>;

}  // namespace lora_rite
