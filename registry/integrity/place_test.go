package integrity

import (
	"bytes"
	"errors"
	"math"
	"testing"
)

func TestParseRange(t *testing.T) {
	for _, c := range []struct {
		in     string
		want   Range
		string string
	}{
		{"0", Range{0, -1}, "0"},
		{"4096", Range{4096, -1}, "4096"},
		{"4096:8192", Range{4096, 8192}, "4096:8192"},
		{"0:1", Range{0, 1}, "0:1"},
		{"007:08", Range{7, 8}, "7:8"}, // the grammar has it
		{"9223372036854775807", Range{math.MaxInt64, -1}, "9223372036854775807"},
	} {
		got, err := ParseRange(c.in)
		if err != nil || got != c.want || got.String() != c.string {
			t.Errorf("%q is %+v (%v), %v; want %+v", c.in, got, got, err, c.want)
		}
	}
	for _, in := range []string{"", ":", "1:", ":1", "-1", "+1", "1:-2", "1:+2", " 1", "1 ", "1: 2", "0x10", "1_0", "1.0", "1:2:3", "[1:2)",
		"2:2", "2:1", "9223372036854775808", "0:9223372036854775808", "99999999999999999999999", "١"} {
		if got, err := ParseRange(in); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%q is %+v, error %v", in, got, err)
		}
	}
}

func TestRangeIn(t *testing.T) {
	for _, c := range []struct {
		r         Range
		size, max int64
		off, n    int64 // n 0: an error
	}{
		{Range{10, -1}, 100, 90, 10, 90},
		{Range{10, 100}, 100, 90, 10, 90},
		{Range{10, 50}, 100, 40, 10, 40},
		{Range{10, 50}, 100, 39, 0, 0},
		{Range{10, -1}, 100, 89, 0, 0},
		{Range{10, 101}, 100, 1000, 0, 0},
		{Range{100, -1}, 100, 1000, 0, 0},
		{Range{101, -1}, 100, 1000, 0, 0},
		{Range{math.MaxInt64, -1}, 100, math.MaxInt64, 0, 0},
		{Range{0, math.MaxInt64}, 100, math.MaxInt64, 0, 0},
		{Range{-1, 10}, 100, 1000, 0, 0},
	} {
		off, n, err := c.r.In(c.size, c.max)
		if off != c.off || n != c.n || errors.Is(err, ErrCorrupt) != (c.n == 0) {
			t.Errorf("%v of %d bytes, at most %d: %d bytes at %d, %v; want %d at %d", c.r, c.size, c.max, n, off, err, c.n, c.off)
		}
	}
}

func TestFrame(t *testing.T) {
	got, err := WrapFrame([]byte("abc"))
	want := []byte("\x50\x2a\x4d\x18\x03\x00\x00\x00abc")
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("frame %x, %v; want %x", got, err, want)
	}
	for magic := range 16 {
		p, err := UnwrapFrame(replaced(want, 0, 0x50+byte(magic)))
		if err != nil || string(p) != "abc" {
			t.Errorf("magic number %d: %q, %v", magic, p, err)
		}
	}
	for _, c := range []struct {
		b   []byte
		off int64
	}{
		{nil, 0}, {want[:7], 7}, {want[:8], 4}, {want[:10], 4}, {append(bytes.Clone(want), 0), 4},
		{replaced(want, 0, 0x4f), 0}, {replaced(want, 0, 0x60), 0}, {replaced(want, 3, 0x19), 0},
		{replaced(want, 0, 0x28, 0xb5, 0x2f, 0xfd), 0}, // zstd's own
		{replaced(want, 4, 0xff, 0xff, 0xff, 0xff), 4},
	} {
		_, err := UnwrapFrame(c.b)
		wantFormatError(t, err, ErrCorrupt, c.off)
	}
}
