package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/profile"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// layers are the opened layer as mount has it.
func (r *reader) layers(b *verifiable.Blob) []openedLayer {
	return []openedLayer{{Layer: registry.Layer{Descriptor: ocispec.Descriptor{Digest: digest.FromBytes(b.Data), Size: int64(len(b.Data))}}, blob: r.layerSource}}
}

// recorded reads the profile in a file, which has one blob.
func recorded(t *testing.T, file string) profile.Blob {
	t.Helper()
	p, err := profile.ReadFile(file)
	must(t, err)
	if len(p.Blobs) != 1 {
		t.Fatalf("%d blobs: %+v", len(p.Blobs), p)
	}
	return p.Blobs[0]
}

// TestRecording: what readers ask for is recorded, in the blob's units, whatever it is verified by and wherever it comes
// from; what others read is not.
func TestRecording(t *testing.T) {
	image := imageBytes(10*testChunk + 100)
	for name, c := range map[string]struct {
		o    verifiable.Options
		unit int64
		size func(b *verifiable.Blob) int // of the blob, or of the image in it
	}{
		"plain": {verifiable.Options{}, 256 << 10, func(b *verifiable.Blob) int { return len(b.Data) }},
		"index": {verifiable.Options{Chunk: testChunk}, testChunk, func(b *verifiable.Blob) int { return len(b.Data) }},
		"tree":  {verifiable.Options{Verity: true}, 256 << 10, func(b *verifiable.Blob) int { return len(b.Data) }},
		"zstd":  {verifiable.Options{Chunk: testChunk, Zstd: true}, testChunk, func(b *verifiable.Blob) int { return len(image) }},
	} {
		for _, verify := range []string{verifyAuto, verifyOff} {
			t.Run(name+", "+verify, func(t *testing.T) {
				p := push(t, verifiable.Make(t, image, c.o), false)
				r, err := p.open(t, verify)
				must(t, err)
				if verify == verifyOff && name != "zstd" {
					c.unit = 256 << 10 // nobody looks at the index
				}
				file := filepath.Join(t.TempDir(), "profile")
				rec, err := newRecording(file, nil, r.layers(p.Blob), r.log)
				must(t, err)
				must(t, rec.begin())
				if got := recorded(t, file); len(got.Reads) != 0 || got.Size != int64(c.size(p.Blob)) || got.Digest != digest.FromBytes(p.Data).String() {
					t.Errorf("before the first read: %+v, want size %d", got, c.size(p.Blob))
				}
				buf := make([]byte, 10)
				must(t, r.cached.ReadAt(t.Context(), buf, 0)) // as who fetches ahead does
				must(t, r.ReadAt(t.Context(), buf, 9*testChunk+1))
				if !r.ReadResident(buf, 9*testChunk+2) {
					t.Error("it is not resident")
				}
				if r.ReadAt(t.Context(), buf, r.Size()-9) == nil || r.ReadResident(buf, -1) {
					t.Error("read outside")
				}
				must(t, rec.Close())
				off := 9 * testChunk / c.unit * c.unit
				want := profile.Read{Off: off, Len: min(c.unit, int64(c.size(p.Blob))-off)}
				if got := recorded(t, file).Reads; len(got) != 1 || got[0] != want {
					t.Errorf("recorded %+v, want %+v", got, want)
				}
			})
		}
	}
}

// TestRecordingWhole: of a layer that was fetched as a whole nothing is recorded, and the log says so.
func TestRecordingWhole(t *testing.T) {
	p := push(t, zeros(t, 1<<20), false)
	r, err := p.open(t, verifyAuto)
	must(t, err)
	file := filepath.Join(t.TempDir(), "profile")
	said := make(logLines, 10)
	rec, err := newRecording(file, nil, r.layers(p.Blob), slog.New(slog.NewTextHandler(said, nil)))
	must(t, err)
	must(t, rec.begin())
	must(t, r.ReadAt(t.Context(), make([]byte, 10), 0))
	must(t, rec.Close())
	if len(said) != 1 || !strings.Contains(<-said, "not recorded: it is fetched as a whole") {
		t.Errorf("%d lines more", len(said))
	}
	if got, err := profile.ReadFile(file); err != nil || len(got.Blobs) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

// logLines has each line that is logged.
type logLines chan string

func (l logLines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// TestRecordingFollows: the file is written while the mount goes on, again after it could not be, and the trouble is
// said once.
func TestRecordingFollows(t *testing.T) {
	p := push(t, verifiable.Make(t, imageBytes(10*testChunk), verifiable.Options{Chunk: testChunk}), false)
	r, err := p.open(t, verifyAuto)
	must(t, err)
	dir := filepath.Join(t.TempDir(), "dir")
	must(t, os.Mkdir(dir, 0o700))
	file := filepath.Join(dir, "profile")
	lines := make(logLines, 10)
	rec, err := newRecording(file, nil, r.layers(p.Blob), slog.New(slog.NewTextHandler(lines, nil)))
	must(t, err)
	saved := make(chan error)
	rec.pause, rec.saved = 0, func(err error) { saved <- err }
	must(t, rec.begin())
	read := func(chunk int64) error {
		must(t, r.ReadAt(t.Context(), make([]byte, 1), chunk*testChunk))
		return <-saved
	}
	must(t, read(0))
	if got := recorded(t, file).Bytes(); got != testChunk {
		t.Errorf("%d bytes after the first read", got)
	}
	must(t, os.Rename(dir, dir+".away"))
	for chunk := range int64(2) {
		if err := read(2 + chunk); err == nil {
			t.Error("it is written where it cannot be")
		}
	}
	if line := <-lines; !strings.Contains(line, "cannot be written") || !strings.Contains(line, file) {
		t.Errorf("logged %q", line)
	}
	must(t, os.Rename(dir+".away", dir))
	must(t, read(6))
	if got := recorded(t, file).Bytes(); got != 4*testChunk {
		t.Errorf("%d bytes after the trouble", got)
	}
	must(t, os.RemoveAll(dir))
	if err := rec.Close(); err == nil || !strings.Contains(err.Error(), "missing in the profile") || !strings.Contains(err.Error(), file) {
		t.Errorf("at the end: %v", err)
	}
	select {
	case line := <-lines:
		t.Errorf("logged once more: %q", line)
	default:
	}
}

// TestRecordingResumed: a server that takes a mount over goes on with what the one before it recorded, where that is
// good for anything.
func TestRecordingResumed(t *testing.T) {
	b := verifiable.Make(t, imageBytes(10*testChunk), verifiable.Options{Chunk: testChunk})
	digest := digest.FromBytes(b.Data)
	before := func(size int) string {
		return fmt.Sprintf(`{"version":1,"blobs":{%q:{"size":%d,"reads":[[0,%d,%d]]}}}`+"\n", digest, size, 8*testChunk, testChunk)
	}
	for name, c := range map[string]struct {
		content string
		said    string
		want    []profile.Read
	}{
		"going on": {before(len(b.Data)), "", []profile.Read{{Order: 0, Off: 8 * testChunk, Len: testChunk}, {Order: 1, Off: 0, Len: testChunk}}},
		"nothing":  {"", "no such file", []profile.Read{{Off: 0, Len: testChunk}}},
		"nonsense": {"nonsense", "not a profile", []profile.Read{{Off: 0, Len: testChunk}}},
		"another":  {before(len(b.Data) + 1), "bytes, and had", []profile.Read{{Off: 0, Len: testChunk}}},
	} {
		t.Run(name, func(t *testing.T) {
			p := push(t, b, false)
			file := filepath.Join(t.TempDir(), "profile")
			if c.content != "" {
				must(t, os.WriteFile(file, []byte(c.content), 0o600))
			}
			var said strings.Builder
			o := openedAsRecorded(t, p, file, &said)
			must(t, o.layers[0].blob.ReadAt(context.Background(), make([]byte, 1), 0))
			o.recording.start()
			must(t, o.Close())
			if got := recorded(t, file).Reads; fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("recorded %v, want %v", got, c.want)
			}
			if said.String() != "" && c.said == "" || !strings.Contains(said.String(), c.said) {
				t.Errorf("logged %q, want %q", said.String(), c.said)
			}
		})
	}
}

// openedAsRecorded opens what the record of an nbd mount with --record says, as reattach does. The device is not asked
// for anything.
func openedAsRecorded(t *testing.T, p *pushed, file string, said *strings.Builder) *opened {
	t.Helper()
	options := &sourceOptions{onError: "wait:1s", cacheDir: t.TempDir(), verify: verifyAuto, record: file}
	rec := backend.Record{Reference: p.ref.String(), Digest: digest.FromBytes(p.Data).String(), Size: int64(len(p.Data)), Access: options.access(), NBD: json.RawMessage(`[{}]`)}
	rec.Integrity = []backend.LayerIntegrity{{MediaType: p.MediaType, Annotations: p.Annotations}}
	prog := &program{stdin: strings.NewReader(""), stdout: said, stderr: said, getenv: func(string) string { return "" }}
	log, err := prog.newLog(logOptions{})
	must(t, err)
	t.Cleanup(prog.closeLog)
	metering, err := resumeMetering(rec.Access, log.Logger)
	must(t, err)
	o, _, err := prog.openRecorded(t.Context(), rec, "", metering, log)
	must(t, err)
	return o
}

// TestRecordFrom: a recording goes on with the profile that is fetched if both are one file, by whatever name.
func TestRecordFrom(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	p, err := profile.New(nil)
	must(t, err)
	must(t, profile.WriteFile(file("p"), p))
	must(t, profile.WriteFile(file("other"), p))
	must(t, os.Link(file("p"), file("hard")))
	must(t, os.Symlink("p", file("soft")))
	for record, same := range map[string]bool{"p": true, "hard": true, "soft": true, "other": false, "new": false} {
		for _, mode := range []string{prefetchMeta, file("p")} {
			o := prefetchOptions{mode: mode}
			must(t, o.resolve())
			s := &sourceOptions{prefetch: o, record: file(record)}
			want := o.profile
			if !same {
				want = nil
			}
			if got := s.recordFrom(); got != want {
				t.Errorf("--prefetch=%s --record=%s: %v, want %v", mode, record, got, want)
			}
		}
	}
}
