#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "lora_rite/nn/python_regex/characters.hpp"
#include "lora_rite/nn/python_regex/tree.hpp"

/// Which texts a regular expression matches.
namespace lora_rite::nn::detail::regex {

using Places = std::vector<char>;  // of a text of n characters: n + 1 flags

inline bool any(const Places& places) { return std::find(places.begin(), places.end(), 1) != places.end(); }

/// Matches one text, once: all places where a match can have got to are followed together. Its arguments must outlive
/// it.
class Matcher {
 public:
  Matcher(const Source& source, const Tree& tree, const std::u32string& text)
      : source_(source), tree_(tree), text_(text) {}

  /// Where a match can end that begins at the start of the text. Throws c10::Error naming the source if that takes too
  /// many steps.
  Places ends() {
    Places start(text_.size() + 1, 0);
    start[0] = 1;
    return after(tree_.root, start);
  }

 private:
  /// Where a match of the node can end that begins at one of the places `from`.
  Places after(int index, const Places& from) {
    constexpr int64_t kMostSteps = 1'000'000;
    TORCH_CHECK(++steps_ <= kMostSteps, source_.label(), "that is matched in ", kMostSteps, " steps");
    const Node& node = tree_.nodes[index];
    if (!any(from)) return from;
    switch (node.kind) {
      case Kind::Sequence: {
        Places places = from;
        for (const int child : node.children) places = after(child, places);
        return places;
      }
      case Kind::Alternatives: {
        Places places(from.size(), 0);
        for (const int child : node.children) unite(places, after(child, from));
        return places;
      }
      case Kind::Repeat:
        return after_repetition(node, from);
      case Kind::Characters: {
        Places places(from.size(), 0);
        for (size_t at = 0; at < text_.size(); ++at) {
          places[at + 1] = from[at] != 0 && node.characters.contains(text_[at]) ? 1 : 0;
        }
        return places;
      }
      default: {
        Places places = from;
        for (size_t at = 0; at < places.size(); ++at) {
          if (places[at] != 0 && !holds_at(node, at)) places[at] = 0;
        }
        return places;
      }
    }
  }

  static void unite(Places& places, const Places& others) {
    for (size_t at = 0; at < places.size(); ++at) places[at] = places[at] != 0 || others[at] != 0 ? 1 : 0;
  }

  Places after_repetition(const Node& node, const Places& from) {
    // Each time advances or stands still: after as many times as there are places, nothing is new.
    const auto most_times = static_cast<int64_t>(from.size()) + 1;
    Places frontier = from;
    for (int64_t times = 0; times < std::min(node.least, most_times); ++times) {
      frontier = after(node.children[0], frontier);
    }
    Places reached = frontier;
    for (int64_t times = node.least; times < node.most && any(frontier); ++times) {
      frontier = after(node.children[0], frontier);
      for (size_t at = 0; at < frontier.size(); ++at) {
        if (reached[at] != 0) frontier[at] = 0;
      }
      unite(reached, frontier);
    }
    return reached;
  }

  bool holds_at(const Node& node, size_t at) {
    const auto is_line_end = [&](size_t place) { return place < text_.size() && text_[place] == '\n'; };
    const auto word = [&](size_t place) { return place < text_.size() && is_word(text_[place], node.flags.ascii); };
    switch (node.kind) {
      case Kind::TextStart:
        return at == 0;
      case Kind::TextEnd:
        return at == text_.size();
      case Kind::LineStart:
        return at == 0 || (node.flags.multi_line && text_[at - 1] == '\n');
      case Kind::LineEnd:
        return at == text_.size() || (is_line_end(at) && (node.flags.multi_line || at + 1 == text_.size()));
      case Kind::Boundary:
        return ((at > 0 && word(at - 1)) != word(at)) != node.negated && !(node.negated && text_.empty());
      default: {
        const auto back = node.kind == Kind::LookBehind ? static_cast<size_t>(node.least) : 0;
        if (back > at) return node.negated;
        Places start(text_.size() + 1, 0);
        start[at - back] = 1;
        const Places found = after(node.children[0], start);
        return (node.kind == Kind::LookBehind ? found[at] != 0 : any(found)) != node.negated;
      }
    }
  }

  const Source& source_;
  const Tree& tree_;
  const std::u32string& text_;
  int64_t steps_ = 0;
};

}  // namespace lora_rite::nn::detail::regex
