#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/nn/python_regex/characters.hpp"
#include "lora_rite/nn/python_regex/reader.hpp"
#include "lora_rite/nn/python_regex/tree.hpp"

/// The grammar of Python's regular expressions.
namespace lora_rite::nn::detail::regex {

/// Makes the tree of a pattern. Throws c10::Error naming its source if it is no regular expression or uses what is
/// refused.
class Parser : private Reader {
 public:
  /// `source` must outlive it.
  Parser(const Source& source, std::u32string pattern) : Reader(source, std::move(pattern)) {}

  Tree parse() {
    const int root = parse_alternatives(Flags(), /*is_top=*/true);
    if (at_ < pattern_.size()) refuse("an unbalanced bracket");
    return {std::move(nodes_), root};
  }

 private:
  int add(Node node) {
    nodes_.push_back(std::move(node));
    return static_cast<int>(nodes_.size()) - 1;
  }

  int add_character(char32_t character, const Flags& flags) {
    if (character >= 128 && flags.ignore_case) refuse("a character beyond ASCII under the flag i");
    Node node(Kind::Characters);
    node.characters.ranges = {{character, character}};
    node.characters.flags = flags;
    return add(std::move(node));
  }

  int parse_alternatives(Flags flags, bool is_top) {
    Node node(Kind::Alternatives);
    do {
      node.children.push_back(parse_sequence(flags, is_top && node.children.empty(), is_top));
    } while (take('|'));
    return add(std::move(node));
  }

  /// `flags` of the whole pattern may be set at its very start, and hold behind it.
  int parse_sequence(Flags& flags, bool may_set_flags, bool is_top) {
    Node node(Kind::Sequence);
    while (at_ < pattern_.size() && !is_next('|') && !(is_next(')') && !is_top)) {
      const char32_t character = pattern_[at_];
      if (character == ')') refuse("an unbalanced bracket");
      if (is_repetition()) {
        if (node.children.empty() || is_place(nodes_[node.children.back()].kind)) refuse("nothing to repeat");
        if (nodes_[node.children.back()].kind == Kind::Repeat) refuse("a repetition of a repetition");
        node.children.back() = parse_repetition(node.children.back());
        continue;
      }
      const int item = parse_item(flags, may_set_flags && node.children.empty());
      if (item >= 0) node.children.push_back(item);
    }
    return add(std::move(node));
  }

  int parse_repetition(int repeated) {
    Node node(Kind::Repeat);
    node.children = {repeated};
    node.most = kUnbounded;
    if (take('?')) {
      node.most = 1;
    } else if (take('+')) {
      node.least = 1;
    } else if (!take('*')) {
      ++at_;  // a brace
      const auto number = [&](int64_t otherwise) {
        if (at_ >= pattern_.size() || !is_digit(pattern_[at_])) return otherwise;
        int64_t value = 0;
        while (at_ < pattern_.size() && is_digit(pattern_[at_])) {
          value = value * 10 + static_cast<int64_t>(pattern_[at_++] - '0');
          if (value >= int64_t{1} << 32) refuse("a repetition of 2^32 times or more");
        }
        return value;
      };
      node.least = number(0);
      if (take(',')) {
        node.most = number(kUnbounded);
      } else {
        node.most = node.least;
      }
      ++at_;
      if (node.most < node.least) refuse("a repetition of more times at least than at most");
    }
    if (take('+')) refuse("a possessive quantifier");
    take('?');  // what is tried first decides nothing here
    return add(std::move(node));
  }

  int parse_item(Flags& flags, bool may_set_flags) {
    const char32_t character = pattern_[at_++];
    switch (character) {
      case '(':
        return parse_bracket(flags, may_set_flags);
      case '[':
        return parse_set(flags);
      case '\\':
        return parse_escape(flags);
      case '^':
        return add_place(Kind::LineStart, flags);
      case '$':
        return add_place(Kind::LineEnd, flags);
      case '.': {
        Node node(Kind::Characters);
        node.characters.negated = true;
        if (!flags.dot_all) node.characters.ranges = {{'\n', '\n'}};
        return add(std::move(node));
      }
      default:
        return add_character(character, flags);
    }
  }

  int add_place(Kind kind, const Flags& flags, bool negated = false) {
    Node node(kind);
    node.flags = flags;
    node.negated = negated;
    return add(std::move(node));
  }

  int parse_escape(const Flags& flags) {
    const char32_t letter = take_any("a backslash at the end");
    switch (letter) {
      case 'A':
        return add_place(Kind::TextStart, flags);
      case 'Z':
        return add_place(Kind::TextEnd, flags);
      case 'b':
      case 'B':
        return add_place(Kind::Boundary, flags, letter == 'B');
      default:
        break;
    }
    if (is_digit(letter) && letter != '0') {
      const auto octal = [&](size_t i) { return at_ + i < pattern_.size() && is_octal(pattern_[at_ + i]); };
      if (!is_octal(letter) || !octal(0) || !octal(1)) refuse("a back-reference");
    }
    Node node(Kind::Characters);
    node.characters.flags = flags;
    if (const char cls = class_letter(letter)) {
      node.characters.classes = cls;
      return add(std::move(node));
    }
    return add_character(escaped(letter), flags);
  }

  int parse_set(const Flags& flags) {
    Node node(Kind::Characters);
    node.characters = read_set(flags);
    return add(std::move(node));
  }

  /// What stands behind an opening bracket. -1 if it matches nothing of itself: a comment, flags.
  int parse_bracket(Flags& flags, bool may_set_flags) {
    if (!take('?')) return parse_group(flags);
    const char32_t kind = take_any("a bracket that is not closed");
    switch (kind) {
      case ':':
        return parse_group(flags);
      case 'P':
        return parse_named(flags);
      case '#':
        while (take_any("a comment that is not closed") != ')') {
        }
        return -1;
      case '=':
      case '!':
        return parse_look_around(Kind::LookAhead, kind == '!', flags);
      case '<': {
        const char32_t sign = take_any("a bracket that is not closed");
        if (sign != '=' && sign != '!') refuse("an extension (?< that Python does not know");
        return parse_look_around(Kind::LookBehind, sign == '!', flags);
      }
      case '(':
        refuse("a condition");
      case '>':
        refuse("an atomic group");
      default:
        --at_;
        return parse_flags(flags, may_set_flags);
    }
  }

  int parse_group(const Flags& flags) {
    const int group = parse_alternatives(flags, /*is_top=*/false);
    if (!take(')')) refuse("a bracket that is not closed");
    return group;
  }

  int parse_named(const Flags& flags) {
    const char32_t sign = take_any("a bracket that is not closed");
    if (sign == '=') refuse("a back-reference");
    if (sign != '<') refuse("an extension (?P that Python does not know");
    std::u32string name;
    for (char32_t c = 0; (c = take_any("a group's name without its >")) != '>';) {
      if (!is_word(c, false) || (name.empty() && is_digit(c))) refuse("a group's name that is no identifier");
      name += c;
    }
    if (name.empty()) refuse("a group without its name");
    if (!names_.insert(name).second) refuse("two groups of one name");
    return parse_group(flags);
  }

  int parse_look_around(Kind kind, bool negated, const Flags& flags) {
    Node node(kind);
    node.negated = negated;
    node.children = {parse_group(flags)};
    if (kind == Kind::LookBehind) {
      const auto [least, most] = width(nodes_, node.children[0]);
      if (least != most) refuse("a look-behind of no fixed width");
      node.least = least;
    }
    return add(std::move(node));
  }

  int parse_flags(Flags& flags, bool may_set_flags) {
    Flags changed = flags;
    bool on = true, any = false;
    std::string kinds;
    while (true) {
      const char32_t letter = take_any("a bracket that is not closed");
      if (letter == ')' || letter == ':') {
        if (!any) refuse("flags that are missing");
        if (letter == ':') return parse_group(changed);
        if (!on) refuse("flags that are off without a colon");
        if (!may_set_flags) refuse("flags of the whole expression that are not at its start");
        check_exclusive(global_kinds_ += kinds);
        flags = changed;
        return -1;
      }
      any = letter != '-';
      switch (letter) {
        case '-':
          if (!on) refuse("a flag that Python does not know");
          on = false;
          break;
        case 'i':
          changed.ignore_case = on;
          break;
        case 'm':
          changed.multi_line = on;
          break;
        case 's':
          changed.dot_all = on;
          break;
        case 'a':
        case 'u':
          if (!on) refuse("the flags a and u cannot be off");
          check_exclusive(kinds += static_cast<char>(letter));
          changed.ascii = letter == 'a';
          break;
        case 'x':
          refuse("the flag x");
        default:
          refuse("a flag that Python does not know");
      }
    }
  }

  void check_exclusive(const std::string& kinds) const {
    if (kinds.find('a') != std::string::npos && kinds.find('u') != std::string::npos) {
      refuse("the flags a and u together");
    }
  }

  std::set<std::u32string> names_;
  std::string global_kinds_;  // a and u, as far as they were set for the whole expression
  std::vector<Node> nodes_;
};

}  // namespace lora_rite::nn::detail::regex
