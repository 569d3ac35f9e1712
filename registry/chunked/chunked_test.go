package chunked_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"

	"github.com/erofs-oci/erofs-oci/registry/chunked"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
)

// stored is a Fetcher of bytes.
type stored struct {
	data  []byte
	whole bool
	open  atomic.Int64
	asked [][2]int64
}

func (s *stored) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	s.asked = append(s.asked, [2]int64{off, n})
	start, end := off, off+n
	if s.whole {
		start, end = 0, int64(len(s.data))
	}
	s.open.Add(1)
	return &body{bytes.NewReader(s.data[start:end]), s}, start, int64(len(s.data)), nil
}

type body struct {
	*bytes.Reader
	s *stored
}

func (b *body) Close() error {
	b.s.open.Add(-1)
	return nil
}

// compress cuts an image into frames of chunk bytes.
func compress(t testing.TB, image []byte, chunk int) ([]byte, *integrity.ChunkIndex, []int) {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var frames [][]byte
	for off := 0; off < len(image); off += chunk {
		frames = append(frames, z.EncodeAll(image[off:min(off+chunk, len(image))], nil))
	}
	data, index := join(t, frames, chunk, len(image))
	var bounds []int
	for i := range index.Len() {
		bounds = append(bounds, int(index.Chunk(i).BlobOff))
	}
	return data, index, append(bounds, len(data))
}

// join makes a blob of frames, each of which is said to be of chunk bytes, but the last one.
func join(t testing.TB, frames [][]byte, chunk, size int) ([]byte, *integrity.ChunkIndex) {
	t.Helper()
	w := integrity.NewChunkIndexBuilder(integrity.Zstd, integrity.SHA256)
	var data []byte
	for i, f := range frames {
		sum := sha256.Sum256(f)
		if err := w.Add(int64(len(data)), int64(i*chunk), sum[:]); err != nil {
			t.Fatal(err)
		}
		data = append(data, f...)
	}
	raw, err := w.Marshal(int64(size), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	index, err := integrity.ParseChunkIndex(raw, int64(len(data)), integrity.ChunkLimits{})
	if err != nil {
		t.Fatal(err)
	}
	return data, index
}

func open(t testing.TB, index *integrity.ChunkIndex, s chunked.Fetcher) *chunked.Image {
	t.Helper()
	m, err := chunked.New(index, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// text compresses about as files do.
func text(n int) []byte {
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	b := make([]byte, n)
	for i := range b {
		b[i] = "etaoin shrdlu\n"[rng.IntN(14)]
	}
	return b
}

// TestFetch: any part of the image comes with one fetch of the frames that have it.
func TestFetch(t *testing.T) {
	const chunk = 10000
	image := text(5*chunk + 123)
	data, index, bounds := compress(t, image, chunk)
	size := int64(len(image))
	for _, whole := range []bool{false, true} {
		s := &stored{data: data, whole: whole}
		m := open(t, index, s)
		if m.Size() != size {
			t.Errorf("size %d, want %d", m.Size(), size)
		}
		for _, c := range []struct{ off, n, first, end int64 }{
			{0, size, 0, 6}, {0, 1, 0, 1}, {0, chunk, 0, 1}, {chunk - 1, 2, 0, 2}, {chunk, chunk, 1, 2},
			{chunk + 5, 3 * chunk, 1, 5}, {size - 1, 1, 5, 6}, {5 * chunk, 123, 5, 6},
		} {
			s.asked = nil
			body, start, total, err := m.Fetch(t.Context(), c.off, c.n)
			if err != nil {
				t.Fatal(err)
			}
			want, from := image[c.off:c.off+c.n], c.off
			if whole && c.first > 0 {
				want, from = image, 0
			}
			got, err := io.ReadAll(body)
			if err != nil || !bytes.Equal(got, want) || start != from || total != size {
				t.Errorf("whole=%v, %d at %d: %d bytes from %d of %d, %v", whole, c.n, c.off, len(got), start, total, err)
			}
			if err := body.Close(); err != nil || s.open.Load() != 0 {
				t.Errorf("%d bodies are open, %v", s.open.Load(), err)
			}
			asked := [2]int64{int64(bounds[c.first]), int64(bounds[c.end] - bounds[c.first])}
			if len(s.asked) != 1 || s.asked[0] != asked {
				t.Errorf("%d at %d: fetched %v, want %v", c.n, c.off, s.asked, asked)
			}
		}
		for _, c := range [][2]int64{{-1, 1}, {0, 0}, {0, size + 1}, {size, 1}, {1, 1<<63 - 1}} {
			if _, _, _, err := m.Fetch(t.Context(), c[0], c[1]); err == nil {
				t.Errorf("%v is taken", c)
			}
		}
	}
	if _, err := chunked.New(plainIndex(t), &stored{}); err == nil {
		t.Error("an index of an image that is not compressed is taken")
	}
}

func plainIndex(t *testing.T) *integrity.ChunkIndex {
	t.Helper()
	w, err := integrity.NewChunkIndexWriter(4096, integrity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(text(100)); err != nil {
		t.Fatal(err)
	}
	raw, err := w.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	x, err := integrity.ParseChunkIndex(raw, 100, integrity.ChunkLimits{})
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestHostileFrames: a frame that holds more or less than its chunk, or no frame at all, is
// an error, and takes no memory to speak of.
func TestHostileFrames(t *testing.T) {
	const chunk = 4096
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	bomb := z.EncodeAll(make([]byte, 32<<20), nil)
	stream := new(bytes.Buffer) // its header does not say how long it is
	w, err := zstd.NewWriter(stream)
	if err != nil {
		t.Fatal(err)
	}
	for range 32 {
		w.Write(make([]byte, 1<<20))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	skip, err := integrity.WrapFrame([]byte("nothing"))
	if err != nil {
		t.Fatal(err)
	}
	right := z.EncodeAll(text(chunk), nil)
	for _, c := range []struct {
		name  string
		frame []byte
		ok    bool
	}{
		{"right", right, true},
		{"padded with a frame of nothing", append(bytes.Clone(right), skip...), true},
		{"two halves", append(z.EncodeAll(text(chunk)[:100], nil), z.EncodeAll(text(chunk)[100:], nil)...), true},
		{"one byte more", z.EncodeAll(text(chunk+1), nil), false},
		{"one byte less", z.EncodeAll(text(chunk-1), nil), false},
		{"a bomb", bomb, false},
		{"a bomb without a size", stream.Bytes(), false},
		{"right, and more", append(bytes.Clone(right), right...), false},
		{"right, and rubbish", append(bytes.Clone(right), "rubbish"...), false},
		{"cut off", right[:len(right)-3], false},
		{"no frame", []byte("this is no frame"), false},
		{"a skippable frame", skip, false},
	} {
		data, index := join(t, [][]byte{c.frame}, chunk, chunk)
		m := open(t, index, &stored{data: data})
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		body, _, _, err := m.Fetch(t.Context(), 0, chunk)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		runtime.ReadMemStats(&after)
		switch {
		case c.ok && (err != nil || !bytes.Equal(got, text(chunk))):
			t.Errorf("%s: %d bytes, %v", c.name, len(got), err)
		case !c.ok && (!errors.Is(err, integrity.ErrCorrupt) || len(got) > 0):
			t.Errorf("%s: %d bytes, %v", c.name, len(got), err)
		}
		if taken := after.TotalAlloc - before.TotalAlloc; taken > 8<<20 {
			t.Errorf("%s: %d bytes were allocated for a chunk of %d", c.name, taken, chunk)
		}
	}
}

// TestGaps: a chunk whose frame does not come, or holds something else, is a gap in the body, of the bytes that were asked
// for; what is behind it comes.
func TestGaps(t *testing.T) {
	const chunk = 10000
	image := text(5 * chunk)
	data, index, bounds := compress(t, image, chunk)
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	// Frames need not fill what the index says they are stored in: a skippable frame is what is left.
	short := z.EncodeAll(text(chunk/2), nil)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	rest := bounds[4] - bounds[3] - len(short)
	wrong := append(bytes.Clone(short), 0x50, 0x2a, 0x4d, 0x18)
	wrong = append(binary.LittleEndian.AppendUint32(wrong, uint32(rest-8)), make([]byte, rest-8)...)
	copy(data[bounds[3]:], wrong)
	fault := errors.New("fault")
	m := open(t, index, &holey{stored{data: data}, integrity.GapError{Off: int64(bounds[1]), Len: int64(bounds[2] - bounds[1]), Err: fault}})
	body, _, _, err := m.Fetch(t.Context(), chunk+3, 4*chunk-3)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	var got []byte
	for _, want := range []integrity.GapError{{Off: chunk + 3, Len: chunk - 3, Err: fault}, {Off: 3 * chunk, Len: chunk, Err: integrity.ErrCorrupt}} {
		p, err := io.ReadAll(body)
		got = append(got, p...)
		var gap *integrity.GapError
		if !errors.As(err, &gap) || gap.Off != want.Off || gap.Len != want.Len || !errors.Is(err, want.Err) {
			t.Errorf("after %d bytes: %v (%+v), want %+v", len(got), err, gap, want)
		}
	}
	p, err := io.ReadAll(body)
	if want := slices.Concat(image[2*chunk:3*chunk], image[4*chunk:]); err != nil || !bytes.Equal(append(got, p...), want) {
		t.Errorf("%d bytes and %d, %v; want %d", len(got), len(p), err, len(want))
	}
}

// holey is a Fetcher of bodies in which a frame is missing.
type holey struct {
	stored
	gap integrity.GapError
}

func (h *holey) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	body, start, total, err := h.stored.Fetch(ctx, off, n)
	if err != nil {
		return nil, 0, 0, err
	}
	return &holeyBody{body, h, start}, start, total, nil
}

type holeyBody struct {
	io.ReadCloser
	h   *holey
	pos int64
}

func (b *holeyBody) Read(p []byte) (int, error) {
	gap := b.h.gap
	if b.pos == gap.Off {
		if _, err := io.CopyN(io.Discard, b.ReadCloser, gap.Len); err != nil {
			return 0, err
		}
		b.pos += gap.Len
		return 0, &gap
	}
	if b.pos < gap.Off {
		p = p[:min(int64(len(p)), gap.Off-b.pos)]
	}
	n, err := b.ReadCloser.Read(p)
	b.pos += int64(n)
	return n, err
}

// TestBodyBreaksOff: what is before the break is right, and the rest is an error.
func TestBodyBreaksOff(t *testing.T) {
	const chunk = 10000
	image := text(3 * chunk)
	data, index, bounds := compress(t, image, chunk)
	for _, cut := range []int{0, 1, bounds[1], bounds[2] - 1, bounds[2], len(data) - 1} {
		m := open(t, index, cutOff{data[:cut]})
		body, _, _, err := m.Fetch(t.Context(), 0, int64(len(image)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		whole := 0
		for whole < 3 && bounds[whole+1] <= cut {
			whole++
		}
		if !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.Equal(got, image[:whole*chunk]) {
			t.Errorf("cut at %d: %d bytes, %v", cut, len(got), err)
		}
	}
}

type cutOff struct{ data []byte }

func (c cutOff) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	return io.NopCloser(bytes.NewReader(c.data)), off, n, nil
}

func TestDecompress(t *testing.T) {
	image := text(3<<20 + 5)
	data, _, _ := compress(t, image, 1<<20)
	skip, err := integrity.WrapFrame([]byte("index"))
	if err != nil {
		t.Fatal(err)
	}
	data = append(data, skip...)
	var out bytes.Buffer
	if n, err := chunked.Decompress(&out, bytes.NewReader(data), int64(len(image))); err != nil || n != int64(len(image)) || !bytes.Equal(out.Bytes(), image) {
		t.Errorf("%d bytes, %v", n, err)
	}
	out.Reset()
	if _, err := chunked.Decompress(&out, bytes.NewReader(data), int64(len(image))-1); !errors.Is(err, integrity.ErrCorrupt) {
		t.Errorf("over the limit: %v", err)
	}
	if out.Len() > len(image)-1 {
		t.Errorf("%d bytes were written", out.Len())
	}
	for _, bad := range [][]byte{data[:1000], []byte("no frame"), append(bytes.Clone(data), 1, 2, 3, 4, 5)} {
		if n, err := chunked.Decompress(io.Discard, bytes.NewReader(bad), 1<<30); !errors.Is(err, integrity.ErrCorrupt) {
			t.Errorf("%d bytes of %d are taken for %d: %v", len(bad), len(data), n, err)
		}
	}
	// The network's and the disk's faults are not the frames'.
	fault := errors.New("fault")
	if _, err := chunked.Decompress(io.Discard, io.MultiReader(bytes.NewReader(data[:1000]), iotest.ErrReader(fault)), 1<<30); !errors.Is(err, fault) || errors.Is(err, integrity.ErrCorrupt) {
		t.Errorf("a fault of the source: %v", err)
	}
	if _, err := chunked.Decompress(full{fault}, bytes.NewReader(data), 1<<30); !errors.Is(err, fault) || errors.Is(err, integrity.ErrCorrupt) {
		t.Errorf("a fault of the disk: %v", err)
	}
}

// full is a Writer that has no room.
type full struct{ err error }

func (f full) Write([]byte) (int, error) { return 0, f.err }

// FuzzFrame: whatever a frame says, a chunk is what it should be, or an error.
func FuzzFrame(f *testing.F) {
	const chunk = 3000
	z, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	defer z.Close()
	image := text(chunk)
	f.Add(z.EncodeAll(image, nil))
	f.Add(z.EncodeAll(make([]byte, chunk), nil))
	f.Add(z.EncodeAll(make([]byte, 10*chunk), nil))
	f.Add([]byte("\x50\x2a\x4d\x18\x02\x00\x00\x00ab"))
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd})
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) == 0 {
			return // no index has such a chunk
		}
		data, index := join(t, [][]byte{frame}, chunk, chunk)
		m := open(t, index, &stored{data: data})
		body, _, _, err := m.Fetch(t.Context(), 0, chunk)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(body)
		switch {
		case err == nil && len(got) != chunk:
			t.Errorf("%d bytes of %d without an error", len(got), chunk)
		case err != nil && (!errors.Is(err, integrity.ErrCorrupt) || len(got) > 0):
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}
