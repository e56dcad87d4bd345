#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

/// Regular expressions as Python's `re` reads them, which is what PEFT matches the names of modules with.
namespace lora_rite::nn::detail {

/// The code points of UTF-8; a byte that is none stands for itself.
inline std::u32string code_points(const std::string& text) {
  std::u32string points;
  for (size_t at = 0; at < text.size();) {
    const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
    const unsigned first = byte(at);
    const size_t more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : first >= 0xC0 ? 1 : 0;
    char32_t point = more == 0 ? first : first & (0x3FU >> more);
    bool whole = first < 0xF8;
    for (size_t i = 1; i <= more; ++i) {
      whole = whole && (byte(at + i) & 0xC0U) == 0x80;
      point = (point << 6) | (byte(at + i) & 0x3FU);
    }
    points += whole ? point : first;
    at += whole ? more + 1 : 1;
  }
  return points;
}

/// A regular expression in the dialect of Python's `re` (3.11): what matches here matches there, and what is an error
/// there is one here. Look-ahead and look-behind, named groups, inline flags (a, i, m, s, u) and every escape but
/// \N{…} are there. Refused by name is what no set of places can tell: back-references, conditions, atomic groups and
/// possessive quantifiers; and the flag x. Beyond ASCII every character counts as a letter but for spaces, and case is
/// not ignored there.
///
/// Whether a text matches does not depend on the order in which a matcher tries things. So all places where a match can
/// have got to are followed at once: no recursion but that of the brackets, no exponential time.
class PythonRegex {
 public:
  /// Throws c10::Error naming the field and `shown`, the pattern as the user wrote it, if `pattern` is no regular
  /// expression, uses what is refused, or is one that only a hostile file would have.
  PythonRegex(std::string field, std::string shown, const std::string& pattern)
      : field_(std::move(field)), shown_(std::move(shown)) {
    constexpr size_t kMostCharacters = 65536, kMostBrackets = 100;
    TORCH_CHECK(pattern.size() <= kMostCharacters, "LoraConfig: ", field_, " is a pattern of ", pattern.size(),
                " characters, expected at most ", kMostCharacters);
    const auto brackets = static_cast<size_t>(std::count(pattern.begin(), pattern.end(), '('));
    TORCH_CHECK(brackets <= kMostBrackets, "LoraConfig: ", field_, " is a pattern with ", brackets,
                " opening brackets, expected at most ", kMostBrackets);
    pattern_ = code_points(pattern);
    root_ = parse_alternatives(Flags(), /*is_top=*/true);
    if (at_ < pattern_.size()) refuse("an unbalanced bracket");
  }

  PythonRegex(const std::string& field, const std::string& pattern) : PythonRegex(field, pattern, pattern) {}

  /// re.fullmatch: the whole text.
  bool full_match(const std::string& text) const {
    const std::u32string points = code_points(text);
    return ends(points).back() != 0;
  }

  /// re.match: a beginning of the text.
  bool match(const std::string& text) const {
    const Places found = ends(code_points(text));
    return std::find(found.begin(), found.end(), 1) != found.end();
  }

 private:
  static constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max();
  using Places = std::vector<char>;  // of a text of n characters: n + 1 flags

  struct Flags {
    bool ascii = false, ignore_case = false, multi_line = false, dot_all = false;
  };

  /// One kind of characters: ranges, and classes by their letters (d, D, s, S, w, W).
  struct Characters {
    std::vector<std::pair<char32_t, char32_t>> ranges;
    std::string classes;
    bool negated = false;
    Flags flags;

    bool contains(char32_t character) const {
      bool found = holds(character);
      if (!found && flags.ignore_case && character < 128) found = holds(lower(character)) || holds(upper(character));
      return found != negated;
    }

   private:
    bool holds(char32_t character) const {
      for (const auto& [first, last] : ranges) {
        if (first <= character && character <= last) return true;
      }
      return std::any_of(classes.begin(), classes.end(),
                         [&](char letter) { return is_in_class(letter, character, flags.ascii); });
    }
  };

  enum class Kind {
    Characters,
    Sequence,
    Alternatives,
    Repeat,
    LineStart,
    LineEnd,
    TextStart,
    TextEnd,
    Boundary,
    LookAhead,
    LookBehind
  };

  struct Node {
    explicit Node(Kind kind) : kind(kind) {}
    Kind kind;
    Characters characters;
    std::vector<int> children;
    int64_t least = 0, most = 0;  // of a repetition; a look-behind's width
    bool negated = false;         // a look-around, a boundary
    Flags flags;
  };

  // --- Characters --------------------------------------------------------------------------------------------------

  static char32_t lower(char32_t c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; }
  static char32_t upper(char32_t c) { return c >= 'a' && c <= 'z' ? c - 32 : c; }
  static bool is_digit(char32_t c) { return c >= '0' && c <= '9'; }
  static bool is_octal(char32_t c) { return c >= '0' && c <= '7'; }
  static bool is_letter(char32_t c) { return lower(c) >= 'a' && lower(c) <= 'z'; }

  static bool is_space(char32_t c, bool ascii) {
    if ((c >= 9 && c <= 13) || c == ' ') return true;
    if (ascii) return false;
    return (c >= 0x1C && c <= 0x1F) || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
  }

  static bool is_word(char32_t c, bool ascii) {
    if (c < 128) return is_letter(c) || is_digit(c) || c == '_';
    return !ascii && !is_space(c, false);
  }

  static bool is_in_class(char letter, char32_t c, bool ascii) {
    switch (letter) {
      case 'd':
        return is_digit(c);
      case 'D':
        return !is_digit(c);
      case 's':
        return is_space(c, ascii);
      case 'S':
        return !is_space(c, ascii);
      case 'w':
        return is_word(c, ascii);
      default:
        return !is_word(c, ascii);
    }
  }

  // --- Reading -----------------------------------------------------------------------------------------------------

  [[noreturn]] void refuse(const std::string& why) const {
    TORCH_CHECK(false, "LoraConfig: ", field_, " is '", shown_, "', expected a regular expression of Python's re ",
                "without back-references, conditions, atomic groups, possessive quantifiers and the flag x: ", why);
  }

  bool is_next(char32_t character) const { return at_ < pattern_.size() && pattern_[at_] == character; }
  bool take(char32_t character) {
    if (!is_next(character)) return false;
    ++at_;
    return true;
  }
  char32_t take_any(const char* missing) {
    if (at_ >= pattern_.size()) refuse(missing);
    return pattern_[at_++];
  }

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

  static bool is_place(Kind kind) {
    return kind == Kind::LineStart || kind == Kind::LineEnd || kind == Kind::TextStart || kind == Kind::TextEnd ||
           kind == Kind::Boundary;
  }

  /// Whether a repetition stands here; a brace that is none is a character like others.
  bool is_repetition() const {
    if (is_next('*') || is_next('+') || is_next('?')) return true;
    if (!is_next('{') || at_ + 1 >= pattern_.size() || pattern_[at_ + 1] == '}') return false;
    size_t at = at_ + 1;
    const auto digits = [&] {
      while (at < pattern_.size() && is_digit(pattern_[at])) ++at;
    };
    digits();
    if (at < pattern_.size() && pattern_[at] == ',') {
      ++at;
      digits();
    }
    return at < pattern_.size() && pattern_[at] == '}';
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

  static char class_letter(char32_t letter) {
    const std::string known = "dDsSwW";
    return letter < 128 && known.find(static_cast<char>(letter)) != std::string::npos ? static_cast<char>(letter) : 0;
  }

  /// The character that an escape stands for, whose first letter is read, in a set or outside of one.
  char32_t escaped(char32_t letter) {
    switch (letter) {
      case 'a':
        return '\a';
      case 'f':
        return '\f';
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 't':
        return '\t';
      case 'v':
        return '\v';
      case 'x':
        return hexadecimal(2);
      case 'u':
        return hexadecimal(4);
      case 'U':
        return hexadecimal(8);
      case 'N':
        refuse("a character by its name (\\N{…})");
      default:
        break;
    }
    if (is_octal(letter)) {
      char32_t value = letter - '0';
      for (int i = 0; i < 2 && at_ < pattern_.size() && is_octal(pattern_[at_]); ++i) {
        value = value * 8 + (pattern_[at_++] - '0');
      }
      if (value > 0377) refuse("an octal escape above \\377");
      return value;
    }
    if (is_letter(letter) || is_digit(letter)) refuse("an escape that Python does not know");
    return letter;
  }

  char32_t hexadecimal(int digits) {
    char32_t value = 0;
    for (int i = 0; i < digits; ++i) {
      const char32_t digit = lower(take_any("an escape that is not whole"));
      if (!is_digit(digit) && !(digit >= 'a' && digit <= 'f')) refuse("an escape that is not whole");
      value = value * 16 + (is_digit(digit) ? digit - '0' : digit - 'a' + 10);
    }
    if (value > 0x10FFFF) refuse("an escape beyond Unicode");
    return value;
  }

  int parse_set(const Flags& flags) {
    Node node(Kind::Characters);
    Characters& set = node.characters;
    set.flags = flags;
    set.negated = take('^');
    const char* open = "a set without its ]";
    // One character of a set, or a class: then its letter is in `cls`.
    const auto element = [&](char32_t character, char& cls) {
      cls = 0;
      if (character != '\\') return character;
      const char32_t letter = take_any(open);
      if (letter == 'b') return char32_t{'\b'};
      cls = class_letter(letter);
      return cls != 0 ? letter : escaped(letter);
    };
    for (bool first = true;; first = false) {
      const char32_t begin = take_any(open);
      if (begin == ']' && !first) break;
      char cls = 0;
      const char32_t low = element(begin, cls);
      char32_t high = low;
      bool ends = false;
      if (take('-')) {
        const char32_t end = take_any(open);
        if (end == ']') {
          set.ranges.emplace_back('-', '-');
          ends = true;
        } else {
          char other = 0;
          high = element(end, other);
          if (cls != 0 || other != 0) refuse("a range from or to a class");
          if (high < low) refuse("a range that ends before it begins");
        }
      }
      if (cls != 0) {
        set.classes += cls;
      } else {
        if (high >= 128 && flags.ignore_case) refuse("a character beyond ASCII under the flag i");
        set.ranges.emplace_back(low, high);
      }
      if (ends) break;
    }
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
      const auto [least, most] = width(node.children[0]);
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

  /// The least and the largest number of characters that a node matches.
  std::pair<int64_t, int64_t> width(int index) const {
    const Node& node = nodes_[index];
    const auto sum = [](int64_t a, int64_t b) { return std::min(kUnbounded - b, a) + b; };
    switch (node.kind) {
      case Kind::Characters:
        return {1, 1};
      case Kind::Sequence:
      case Kind::Alternatives: {
        std::pair<int64_t, int64_t> all = {0, 0};
        for (size_t i = 0; i < node.children.size(); ++i) {
          const auto own = width(node.children[i]);
          if (node.kind == Kind::Sequence) {
            all = {sum(all.first, own.first), sum(all.second, own.second)};
          } else {
            all = i == 0 ? own : std::pair(std::min(all.first, own.first), std::max(all.second, own.second));
          }
        }
        return all;
      }
      case Kind::Repeat: {
        const auto own = width(node.children[0]);
        const auto times = [](int64_t count, int64_t by) {
          return count == 0 || by == 0 ? 0 : by > kUnbounded / count ? kUnbounded : count * by;
        };
        return {times(node.least, own.first), times(node.most, own.second)};
      }
      default:
        return {0, 0};
    }
  }

  // --- Matching ----------------------------------------------------------------------------------------------------

  struct Run {
    const std::u32string& text;
    int64_t steps = 0;
  };

  /// Where a match can end that begins at the start of the text.
  Places ends(const std::u32string& text) const {
    Places start(text.size() + 1, 0);
    start[0] = 1;
    Run run{text};
    return after(root_, start, run);
  }

  static bool any(const Places& places) { return std::find(places.begin(), places.end(), 1) != places.end(); }

  /// Where a match of the node can end that begins at one of the places `from`.
  Places after(int index, const Places& from, Run& run) const {
    constexpr int64_t kMostSteps = 1'000'000;
    TORCH_CHECK(++run.steps <= kMostSteps, "LoraConfig: ", field_, " is '", shown_,
                "', expected a regular expression that is matched in ", kMostSteps, " steps");
    const Node& node = nodes_[index];
    if (!any(from)) return from;
    switch (node.kind) {
      case Kind::Sequence: {
        Places places = from;
        for (const int child : node.children) places = after(child, places, run);
        return places;
      }
      case Kind::Alternatives: {
        Places places(from.size(), 0);
        for (const int child : node.children) unite(places, after(child, from, run));
        return places;
      }
      case Kind::Repeat:
        return after_repetition(node, from, run);
      case Kind::Characters: {
        Places places(from.size(), 0);
        for (size_t at = 0; at < run.text.size(); ++at) {
          places[at + 1] = from[at] != 0 && node.characters.contains(run.text[at]) ? 1 : 0;
        }
        return places;
      }
      default: {
        Places places = from;
        for (size_t at = 0; at < places.size(); ++at) {
          if (places[at] != 0 && !holds_at(node, at, run)) places[at] = 0;
        }
        return places;
      }
    }
  }

  static void unite(Places& places, const Places& others) {
    for (size_t at = 0; at < places.size(); ++at) places[at] = places[at] != 0 || others[at] != 0 ? 1 : 0;
  }

  Places after_repetition(const Node& node, const Places& from, Run& run) const {
    // Each time advances or stands still: after as many times as there are places, nothing is new.
    const auto most_times = static_cast<int64_t>(from.size()) + 1;
    Places frontier = from;
    for (int64_t times = 0; times < std::min(node.least, most_times); ++times) {
      frontier = after(node.children[0], frontier, run);
    }
    Places reached = frontier;
    for (int64_t times = node.least; times < node.most && any(frontier); ++times) {
      frontier = after(node.children[0], frontier, run);
      for (size_t at = 0; at < frontier.size(); ++at) {
        if (reached[at] != 0) frontier[at] = 0;
      }
      unite(reached, frontier);
    }
    return reached;
  }

  bool holds_at(const Node& node, size_t at, Run& run) const {
    const std::u32string& text = run.text;
    const auto is_line_end = [&](size_t place) { return place < text.size() && text[place] == '\n'; };
    const auto word = [&](size_t place) { return place < text.size() && is_word(text[place], node.flags.ascii); };
    switch (node.kind) {
      case Kind::TextStart:
        return at == 0;
      case Kind::TextEnd:
        return at == text.size();
      case Kind::LineStart:
        return at == 0 || (node.flags.multi_line && text[at - 1] == '\n');
      case Kind::LineEnd:
        return at == text.size() || (is_line_end(at) && (node.flags.multi_line || at + 1 == text.size()));
      case Kind::Boundary:
        return ((at > 0 && word(at - 1)) != word(at)) != node.negated && !(node.negated && text.empty());
      default: {
        const auto back = node.kind == Kind::LookBehind ? static_cast<size_t>(node.least) : 0;
        if (back > at) return node.negated;
        Places start(text.size() + 1, 0);
        start[at - back] = 1;
        const Places found = after(node.children[0], start, run);
        return (node.kind == Kind::LookBehind ? found[at] != 0 : any(found)) != node.negated;
      }
    }
  }

  std::string field_, shown_;
  std::u32string pattern_;
  size_t at_ = 0;
  std::set<std::u32string> names_;
  std::string global_kinds_;  // a and u, as far as they were set for the whole expression
  std::vector<Node> nodes_;
  int root_ = 0;
};

}  // namespace lora_rite::nn::detail
