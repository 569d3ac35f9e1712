package mkerofs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"
)

// TestTempLimit: what Layers spool and what was compressed count together, holes do not, and nothing stays behind.
func TestTempLimit(t *testing.T) {
	// Noise takes two blocks once it was read, and two more when it was compressed in vain.
	const noise, spooled = 8192, 2 * 8192
	sparse := append(make([]byte, 1<<20), content(1, noise)...) // whole pieces of zeros, of 64 KiB
	for _, c := range []struct {
		name   string
		data   []byte
		method Algorithm
		limit  int64
		apply  error
		finish error
	}{
		{"none", content(1, noise), LZ4, 0, nil, nil},
		{"as much as is needed", content(1, noise), LZ4, spooled, nil, nil},
		{"less for what is compressed", content(1, noise), LZ4, spooled - 1, nil, ErrTempLimit},
		{"less for the layer", content(1, noise), LZ4, noise - 1, ErrTempLimit, nil},
		{"not compressed", content(1, noise), Uncompressed, noise, nil, nil},
		{"holes", sparse, Uncompressed, noise, nil, nil},
		{"holes, and less", sparse, Uncompressed, noise - 1, ErrTempLimit, nil},
	} {
		dir := t.TempDir()
		var m memory
		b, err := New(&m, Options{Compression: Compression{Algorithm: c.method}, TempDir: dir, TempLimit: c.limit})
		if err != nil {
			t.Fatal(err)
		}
		l, err := NewLayers(b, LayerOptions{})
		if err != nil {
			t.Fatal(err)
		}
		err = l.Apply(t.Context(), io.MultiReader(bytes.NewReader(tarOf(t, "file = "+string(c.data)))))
		if !errors.Is(err, c.apply) {
			t.Errorf("%s: apply: %v, want %v", c.name, err, c.apply)
		}
		if err == nil {
			if _, err := b.Finish(t.Context()); !errors.Is(err, c.finish) {
				t.Errorf("%s: finish: %v, want %v", c.name, err, c.finish)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		files, err := os.ReadDir(dir)
		if err != nil || len(files) != 0 || b.temp.used != 0 {
			t.Errorf("%s: %d files and %d bytes are left, %v", c.name, len(files), b.temp.used, err)
		}
	}
	if _, err := New(nil, Options{TempLimit: -1}); err == nil {
		t.Error("a negative limit was taken")
	}
}
