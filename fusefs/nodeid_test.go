package fusefs

import (
	"math/rand/v2"
	"testing"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

func TestNodeIDs(t *testing.T) {
	const metabox = erofsfmt.Nid(1) << 63
	for _, c := range []struct {
		root, nid erofsfmt.Nid
		node      uint64
	}{
		{root: 36, nid: 36, node: 1},
		{root: 36, nid: 0, node: 2},
		{root: 36, nid: 37, node: 39},
		{root: 0, nid: 0, node: 1},
		{root: 0, nid: 1, node: 3},
		{root: metabox | 5, nid: metabox | 5, node: 1},
		{root: metabox | 5, nid: 5, node: 7},
		{root: 36, nid: metabox, node: 1<<63 | 2},
		{root: 36, nid: metabox | 36, node: 1<<63 | 38},
		// Of several layers (erofsfmt.OpenLayers); the last nid of one reaches into
		// the next.
		{root: 36, nid: 499<<54 | 36, node: 499<<54 | 38},
		{root: 36, nid: 1<<54 - 1, node: 1<<54 | 1},
		{root: 36, nid: metabox | 499<<54 | (1<<54 - 1), node: 1<<63 | 500<<54 | 1},
	} {
		ids := nodeIDs{root: c.root}
		if got := ids.node(c.nid); got != c.node {
			t.Errorf("root %#x: node(%#x) = %#x, want %#x", c.root, c.nid, got, c.node)
		}
		if got := ids.nid(c.node); got != c.nid {
			t.Errorf("root %#x: nid(%#x) = %#x, want %#x", c.root, c.node, got, c.nid)
		}
	}
}

// TestNodeIDsAreABijection tries nids that an image of 2^63 bytes may have, and those of
// layers.
func TestNodeIDsAreABijection(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	ids := nodeIDs{root: 36}
	seen := make(map[uint64]erofsfmt.Nid)
	for range 100_000 {
		nid := erofsfmt.Nid(r.Uint64N(1<<58) >> r.IntN(58))
		if r.IntN(2) == 0 {
			nid = nid&(1<<54-1) | erofsfmt.Nid(r.IntN(erofsfmt.MaxLayers))<<54
		}
		if r.IntN(2) == 0 {
			nid |= 1 << 63
		}
		node := ids.node(nid)
		if node == 0 || node == 1 && nid != 36 || ids.nid(node) != nid {
			t.Fatalf("nid %#x is node %#x is nid %#x", nid, node, ids.nid(node))
		}
		if other, ok := seen[node]; ok && other != nid {
			t.Fatalf("nids %#x and %#x are both node %#x", nid, other, node)
		}
		seen[node] = nid
	}
}
