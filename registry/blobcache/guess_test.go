package blobcache

import (
	"math/rand/v2"
	"testing"
)

// A book is what a guesser's readers have read, without a cache around it.
type book struct {
	guesser
	read map[int64]bool
}

func newBook(chunks, max int64) *book {
	b := &book{read: map[int64]bool{}}
	b.guesser = newGuesser(chunks, max, func(c int64) bool { return b.read[c] })
	return b
}

// turn reads the chunks [first, end) and gives what is guessed for the stream, and takes that for fetched.
func (b *book) turn(first, end int64) (from, to int64) {
	for c := first; c < end; c++ {
		b.read[c] = true
	}
	c := b.follow(first, end)
	from, to = b.next(c)
	c.ahead = to
	return from, to
}

// By hand: a stream's first window is a sixteenth of the largest, and its window what it has read after that.
func TestStreams(t *testing.T) {
	type turn struct{ first, end, from, to int64 }
	nothing := func(c int64) turn { return turn{c, c + 1, 0, 0} }
	for _, test := range []struct {
		name        string
		chunks, max int64
		turns       []turn
	}{
		{"one after the other", 1000, 64, []turn{
			nothing(0), {1, 2, 2, 6}, nothing(2), {3, 4, 6, 8}, nothing(4), {5, 6, 8, 12}, nothing(6), {7, 8, 12, 16},
			nothing(8), nothing(9), {10, 11, 16, 22}, nothing(11),
		}},
		{"to the end of the blob", 8, 64, []turn{nothing(0), {1, 2, 2, 6}, nothing(2), {3, 4, 6, 8}, nothing(4), nothing(5), nothing(6), nothing(7)}},
		{"to the end, less than half a window", 7, 64, []turn{nothing(0), {1, 2, 2, 6}, {2, 3, 6, 7}, nothing(3)}},
		{"a large read begins a stream, the second is its proof", 1000, 64, []turn{{10, 30, 0, 0}, {30, 50, 50, 66}, {50, 51, 66, 82}}},
		{"no window is larger than the largest", 1000, 64, []turn{
			{0, 200, 0, 0}, {200, 201, 201, 217}, {201, 202, 217, 233}, {202, 203, 233, 249}, {203, 204, 249, 265},
			nothing(204), nothing(205),
		}},
		{"a small bound", 1000, 1, []turn{nothing(0), {1, 2, 2, 3}, {2, 3, 3, 4}}},
		{"backwards", 1000, 64, []turn{nothing(50), nothing(40), nothing(30), nothing(20)}},
		{"far apart", 1000, 64, []turn{nothing(50), nothing(60), nothing(70), nothing(80)}},
		{"every second chunk", 1000, 64, []turn{nothing(0), nothing(2), nothing(4), nothing(6), nothing(8), nothing(10)}},
		{"two of three", 1000, 64, []turn{nothing(0), {1, 2, 2, 6}, {3, 4, 6, 8}, nothing(4), {6, 7, 8, 11}}},
		{"a skip within the window, and it gets smaller", 1000, 64, []turn{
			{0, 20, 0, 0}, {20, 21, 21, 37}, // 21 were read: the window is 21
			{30, 31, 37, 44},         // 9 were skipped: 13
			nothing(37), nothing(38), // 6 more: 8, and 9
			{39, 40, 44, 50}, // 10
		}},
		{"a skip further than the window", 1000, 64, []turn{{0, 20, 0, 0}, {20, 21, 21, 37}, nothing(100)}},
		{"what was skipped is read after all", 1000, 64, []turn{{0, 4, 0, 0}, {4, 5, 5, 10}, {8, 9, 10, 13}, nothing(6), nothing(5), nothing(7), {9, 10, 13, 17}}},
		{"two streams at once", 1000, 64, []turn{
			nothing(100), nothing(500), {101, 102, 102, 106}, {501, 502, 502, 506}, nothing(102), nothing(502), {103, 104, 106, 108}, {503, 504, 506, 508},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBook(test.chunks, test.max)
			for i, turn := range test.turns {
				from, to := b.turn(turn.first, turn.end)
				if from == to {
					from, to = 0, 0
				}
				if from != turn.from || to != turn.to {
					t.Errorf("turn %d, chunks %d to %d: guessed %d to %d, want %d to %d", i, turn.first, turn.end, from, to, turn.from, turn.to)
				}
			}
		})
	}
}

// What has been read already is not skipped.
func TestSkipOverWhatWasRead(t *testing.T) {
	b := newBook(1000, 64)
	b.turn(10, 11)
	b.read[11], b.read[12] = true, true
	if from, to := b.turn(13, 14); from != 14 || to != 18 {
		t.Errorf("guessed %d to %d", from, to)
	}
}

// A stream that has proved itself outlives a hundred reads elsewhere, and not a thousand.
func TestStreamsAreKept(t *testing.T) {
	for reads, kept := range map[int64]bool{maxCursors: true, 100: true, 1000: false} {
		b := newBook(1<<20, 64)
		b.turn(0, 10)
		b.turn(10, 11)
		for i := range reads {
			if from, to := b.turn(1000+10*i, 1001+10*i); from != to {
				t.Fatalf("guessed %d to %d", from, to)
			}
		}
		from, to := b.turn(21, 22)
		if (to > from) != kept {
			t.Errorf("after %d reads elsewhere: %d to %d is guessed for the stream", reads, from, to)
		}
	}
}

func TestRegions(t *testing.T) {
	for _, test := range []struct {
		name        string
		chunks, max int64
		read        []int64 // the last one asks
		from, to    int64
	}{
		{"three of eight", 1000, 64, []int64{8, 12, 15}, 0, 0},
		{"four of eight", 1000, 64, []int64{15, 8, 12, 10}, 8, 16},
		{"four of two regions", 1000, 64, []int64{6, 7, 8, 9}, 0, 0},
		{"eight of sixteen", 1000, 64, []int64{15, 14, 13, 12, 11, 10, 9, 8}, 0, 16},
		{"eight of sixteen, not four of eight", 1000, 64, []int64{0, 1, 2, 3, 4, 8, 9, 10}, 0, 16},
		{"sixteen of thirty-two", 1000, 64, []int64{32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62}, 32, 64},
		{"no more than is wanted ahead", 1000, 8, []int64{15, 14, 13, 12, 11, 10, 9, 8}, 8, 16},
		{"nothing is wanted ahead", 1000, 0, []int64{15, 14, 13, 12, 11, 10, 9, 8}, 0, 0},
		{"the last, which is short", 13, 64, []int64{8, 9, 10, 11}, 8, 13},
	} {
		b := newBook(test.chunks, test.max)
		for _, c := range test.read {
			b.read[c] = true
		}
		if from, to := b.region(test.read[len(test.read)-1]); from != test.from || to != test.to {
			t.Errorf("%s: %d to %d, want %d to %d", test.name, from, to, test.from, test.to)
		}
	}
}

// BenchmarkGuess is what the first read of a chunk costs; other reads of it cost nothing of that.
func BenchmarkGuess(b *testing.B) {
	const chunks = 4096
	read := make(bitmap, chunks/64)
	g := newGuesser(chunks, 64, read.has)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := int64(0); b.Loop(); i++ {
		chunk := i % chunks
		if i%4 != 0 {
			chunk = rng.Int64N(chunks)
		}
		read.set(chunk)
		g.next(g.follow(chunk, chunk+1))
		g.region(chunk)
	}
}
