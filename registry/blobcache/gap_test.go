package blobcache

import (
	"errors"
	"fmt"
	"slices"
	"testing"
)

// What a gap has a part of is refused, and nothing else; it takes one request more for what is asked for again.
func TestGaps(t *testing.T) {
	const size = 10*cs + 100
	once, always := verdict{temporary: true}, verdict{}
	for _, c := range []struct {
		name    string
		whole   bool
		off, n  int64 // of the first read
		missing []missing
		fails   error
		here    []int64 // afterwards
		asked   []request
	}{
		{"a part of a chunk", false, 0, 4 * cs, []missing{{request{cs + 5, 7}, always}}, always, []int64{0, 2, 3}, []request{{0, 4 * cs}}},
		{"a part of a chunk, for a time", false, 0, 4 * cs, []missing{{request{cs + 5, 7}, once}}, nil, chunks(0, 4), []request{{0, 4 * cs}, {cs, cs}}},
		{"two in one chunk", false, 0, 4 * cs, []missing{{request{cs + 5, 7}, once}, {request{cs + 13, 2}, once}}, nil, chunks(0, 4), []request{{0, 4 * cs}, {cs, cs}}},
		{"one behind the other", false, 0, 4 * cs, []missing{{request{cs, cs}, always}, {request{2 * cs, 1}, always}}, always, []int64{0, 3}, []request{{0, 4 * cs}}},
		{"parts of three chunks", false, 0, 6 * cs, []missing{{request{2*cs - 1, cs + 2}, once}}, nil, chunks(0, 6), []request{{0, 6 * cs}, {cs, 3 * cs}}},
		{"from the first byte", false, 3 * cs, 2 * cs, []missing{{request{3 * cs, 1}, once}}, nil, []int64{3, 4}, []request{{3 * cs, 2 * cs}, {3 * cs, cs}}},
		{"to the last byte", false, 8 * cs, size - 8*cs, []missing{{request{size - 101, 101}, once}}, nil, []int64{8, 9, 10}, []request{{8 * cs, size - 8*cs}, {9 * cs, cs + 100}}},
		{"all of it", false, cs, cs, []missing{{request{cs, cs}, always}}, always, []int64{}, []request{{cs, cs}}},
		{"in a whole blob", true, 4 * cs, cs, []missing{{request{2 * cs, 1}, always}, {request{6*cs - 1, 2}, always}, {request{10 * cs, 100}, always}}, nil, []int64{0, 1, 3, 4, 7, 8, 9}, []request{{4 * cs, cs}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			stage(t, func(t *testing.T) {
				s := newServer(size)
				s.answer = func(call int, a *answer) {
					if call == 0 {
						a.missing = c.missing
						if c.whole {
							a.start, a.end = 0, size
						}
					}
				}
				b := open(t, s, Options{})
				if err := readNow(ctx, b, s, c.off, c.n); !errors.Is(err, c.fails) || (err == nil) != (c.fails == nil) {
					t.Errorf("error %v, want %v", err, c.fails)
				}
				mustHave(t, b, s, c.here)
				if got := s.asked(); !slices.Equal(got, c.asked) {
					t.Errorf("requests %v, want %v", got, c.asked)
				}
				if st := b.store.cache.Stats(); st.Refused == 0 || s.open.Load() != 0 {
					t.Errorf("stats %+v, %d bodies are open", st, s.open.Load())
				}
				if err := readNow(ctx, b, s, 0, size); err != nil {
					t.Errorf("the next reader: %v", err)
				}
			})
		})
	}
}

// An error that is of other bytes than those that come next, or of none, is a body's end.
func TestNoGap(t *testing.T) {
	for _, r := range []request{{cs, 1}, {3 * cs, cs}, {2 * cs, 0}, {2 * cs, -cs}, {2 * cs, 8*cs + 1}, {2 * cs, 1<<63 - 1}} {
		s := newServer(10 * cs)
		s.answer = func(call int, a *answer) {
			if call == 0 {
				a.end, a.broken = 2*cs, fmt.Errorf("body: %w", missing{r, errServer})
			}
		}
		b := open(t, s, Options{})
		if err := readNow(ctx, b, s, 0, 6*cs); !errors.Is(err, errServer) {
			t.Errorf("%v: error %v", r, err)
		}
		if got, want := residents(t, b, s), chunks(0, 2); !slices.Equal(got, want) || b.store.cache.Stats().Refused != 0 {
			t.Errorf("%v: present %v, want %v", r, got, want)
		}
	}
}

// Who has a chunk that another flight brings does not mind that it is missing where it passes by.
func TestGapInWhatOthersBring(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(10 * cs)
		gate := make(chan struct{})
		s.gates = map[int64]chan struct{}{4*cs + 1: gate}
		s.answer = func(call int, a *answer) {
			if call == 1 {
				a.start, a.end, a.missing = 0, 10*cs, []missing{{request{3 * cs, 2 * cs}, verdict{}}}
			}
		}
		b := open(t, s, Options{})
		first := read(ctx, b, s, 4*cs, cs)
		mustWait(t, "who reads chunk 4", first)
		mustEnd(t, "who reads chunk 8", read(ctx, b, s, 8*cs, cs), nil)
		close(gate)
		mustEnd(t, "who reads chunk 4", first, nil)
		mustHave(t, b, s, []int64{0, 1, 2, 4, 5, 6, 7, 8, 9})
	})
}
