#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "lora_rite/nn/python_regex/characters.hpp"

/// What a regular expression is once it is read: a tree of nodes.
namespace lora_rite::nn::detail::regex {

inline constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max();

/// Where a pattern comes from, for errors.
struct Source {
  std::string field, shown;  // a field of LoraConfig; the pattern as the user wrote it

  std::string label() const { return "LoraConfig: " + field + " is '" + shown + "', expected a regular expression "; }
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

inline bool is_place(Kind kind) {
  return kind == Kind::LineStart || kind == Kind::LineEnd || kind == Kind::TextStart || kind == Kind::TextEnd ||
         kind == Kind::Boundary;
}

/// A part of an expression; `children` are places in the tree's list of nodes.
struct Node {
  explicit Node(Kind kind) : kind(kind) {}
  Kind kind;
  Characters characters;
  std::vector<int> children;
  int64_t least = 0, most = 0;  // of a repetition; a look-behind's width
  bool negated = false;         // a look-around, a boundary
  Flags flags;
};

/// A whole expression: its nodes, each behind its children, and which of them it is.
struct Tree {
  std::vector<Node> nodes;
  int root = 0;
};

/// The least and the largest number of characters that a node matches.
inline std::pair<int64_t, int64_t> width(const std::vector<Node>& nodes, int index) {
  const Node& node = nodes[index];
  const auto sum = [](int64_t a, int64_t b) { return std::min(kUnbounded - b, a) + b; };
  switch (node.kind) {
    case Kind::Characters:
      return {1, 1};
    case Kind::Sequence:
    case Kind::Alternatives: {
      std::pair<int64_t, int64_t> all = {0, 0};
      for (size_t i = 0; i < node.children.size(); ++i) {
        const auto own = width(nodes, node.children[i]);
        if (node.kind == Kind::Sequence) {
          all = {sum(all.first, own.first), sum(all.second, own.second)};
        } else {
          all = i == 0 ? own : std::pair(std::min(all.first, own.first), std::max(all.second, own.second));
        }
      }
      return all;
    }
    case Kind::Repeat: {
      const auto own = width(nodes, node.children[0]);
      const auto times = [](int64_t count, int64_t by) {
        return count == 0 || by == 0 ? 0 : by > kUnbounded / count ? kUnbounded : count * by;
      };
      return {times(node.least, own.first), times(node.most, own.second)};
    }
    default:
      return {0, 0};
  }
}

}  // namespace lora_rite::nn::detail::regex
