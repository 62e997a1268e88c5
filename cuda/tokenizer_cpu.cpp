// Greedy longest match: bytes as the longest pieces of a table, one after another.
// src/ops/longest_match.py has the same in plain Python.
//
// The pieces are a trie. Its edges (node, byte) -> child are in one hash table, 2 MB for World's 65,529 pieces.
// A match reads on until no longer piece can fit, so a token costs at most as many steps as the longest piece
// has bytes.
//
// The C interface: trie_new, then trie_match in any number of threads, then trie_free.
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

class Trie {
public:
    Trie(const uint8_t* bytes, const int64_t* ends, const int32_t* ids, int64_t count)
        : ids(ids, ids + count), edges(1024) {
        uint32_t inner = uint32_t(count);  // the last number of a node
        for (int64_t i = 0, place = 0; i < count; i++)
            for (uint32_t node = 0; place < ends[i]; place++) {
                const uint64_t key = uint64_t(node) << 8 | bytes[place];
                Edge& edge = at(key);
                node = edge.child;
                if (node) continue;
                // shorter pieces are there already: the last byte of a piece makes a new node
                node = place + 1 == ends[i] ? uint32_t(i) + 1 : ++inner;
                edge = {uint32_t(key), node};
                if (2 * ++used > edges.size()) grow();
            }
    }

    int64_t match(const uint8_t* text, int64_t size, int32_t* found) const {
        int64_t count = 0;
        for (int64_t place = 0; place < size; count++) {
            uint32_t node = 0, piece = 0;
            int64_t end = place;
            for (int64_t i = place; i < size; i++) {
                node = at(uint64_t(node) << 8 | text[i]).child;
                if (!node) break;
                if (node <= ids.size()) piece = node, end = i + 1;
            }
            if (!piece) break;
            found[count] = ids[piece - 1];
            place = end;
        }
        return count;
    }

private:
    struct Edge {
        uint32_t key;    // the parent's number * 256 + the byte
        uint32_t child;  // 0, the root, is no child: the place is free. 1 to `count`: a piece ends here
    };

    std::vector<int32_t> ids;
    std::vector<Edge> edges;  // at most half full, for short searches
    size_t used = 0;
    int shift = 54;  // leaves as many of a product's 64 bits as an index of `edges` has

    // the edge of this key, or the free place where it would be
    Edge& at(uint64_t key) { return const_cast<Edge&>(static_cast<const Trie*>(this)->at(key)); }
    const Edge& at(uint64_t key) const {
        size_t i = key * 0x9e3779b97f4a7c15u >> shift;
        while (edges[i].child && edges[i].key != key) i = (i + 1) & (edges.size() - 1);
        return edges[i];
    }

    void grow() {
        std::vector<Edge> before(2 * edges.size());
        before.swap(edges);
        shift--;
        for (const Edge& edge : before)
            if (edge.child) at(edge.key) = edge;
    }
};

}  // namespace

extern "C" {

// `ends`: where each of the `count` pieces ends in `bytes`. No piece is empty, none is there twice, a longer
// one comes behind a shorter one, and all have fewer than 2^24 bytes together.
void* trie_new(const uint8_t* bytes, const int64_t* ends, const int32_t* ids, int64_t count) {
    return new Trie(bytes, ends, ids, count);
}

void trie_free(void* trie) { delete static_cast<Trie*>(trie); }

// Returns the number of ids. `found` has room for `size` of them. They end early where no piece fits.
int64_t trie_match(const void* trie, const uint8_t* text, int64_t size, int32_t* found) {
    return static_cast<const Trie*>(trie)->match(text, size, found);
}
}
