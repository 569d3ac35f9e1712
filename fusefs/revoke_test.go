package fusefs

import (
	"slices"
	"testing"
)

// TestNodesNoted: what is noted is found again, whatever a node's number.
func TestNodesNoted(t *testing.T) {
	var none *revoking
	none.note(1) // what is never revoked notes nothing
	if none.why() != nil {
		t.Error("it was revoked")
	}
	r := &revoking{}
	want := []uint64{0, 1, 63, 64, 4095, 4096, 4097, 1 << 40, 1<<63 - 1, 1 << 63, 1<<64 - 1}
	for _, n := range want {
		r.note(n)
		r.note(n)
	}
	got := r.nodes()
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("noted %v, want %v", got, want)
	}
	if len(r.read) != 6 {
		t.Errorf("%d pieces for 6 neighbourhoods", len(r.read))
	}
}
