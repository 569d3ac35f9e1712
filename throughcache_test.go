package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// TestSecondMount: what was read costs nothing the next time; a tag costs the GET that says where it leads now, a
// digest not even that.
func TestSecondMount(t *testing.T) {
	for name, kinds := range allKinds() {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kinds...)
			s.fill()
			o := s.mustOpen(false)
			if failed := s.readAll(o); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			if st := s.registry.Stats(); st.ManifestGETs != 1 || s.requests() != 1 {
				t.Errorf("the tag: %+v, want one GET of a manifest", st)
			}
			byDigest, err := registry.ParseReference(s.ref)
			must(t, err)
			byDigest.Tag, byDigest.Digest = "", o.image.Digest
			s.ref = byDigest.String()
			if failed := s.readAll(s.mustOpen(false)); failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			if n := s.requests(); n != 0 {
				t.Errorf("the digest: %d requests", n)
			}
		})
	}
}

// TestFirstMountCostsNoMore: what is kept beside a layer is fetched as before, in as many requests, and no byte more.
func TestFirstMountCostsNoMore(t *testing.T) {
	for name, c := range map[string]struct {
		kind verifiable.Options
		sent func(b *verifiable.Blob) int
	}{
		"index":       {verifiable.Options{Chunk: testChunk}, func(b *verifiable.Blob) int { return len(b.Data) - b.IndexOffset }},
		"index apart": {verifiable.Options{Chunk: testChunk, Apart: true}, func(b *verifiable.Blob) int { return len(b.Index) }},
		"tree":        {verifiable.Options{Verity: true}, func(b *verifiable.Blob) int { return len(b.Data) - b.HashOffset }},
		"both":        {verifiable.Options{Chunk: testChunk, Verity: true}, func(b *verifiable.Blob) int { return len(b.Data) - b.IndexOffset }},
		"zstd":        {verifiable.Options{Chunk: testChunk, Zstd: true}, func(b *verifiable.Blob) int { return len(b.Data) - b.IndexOffset }},
		"zstd, whole": {verifiable.Options{Zstd: true}, func(b *verifiable.Blob) int { return len(b.Data) }},
	} {
		s := newShelf(t, c.kind)
		s.mustOpen(false)
		if st := s.registry.Stats(); st.BlobGETs != 1 || st.BlobBytes != int64(c.sent(s.blobs[0])) || st.ManifestGETs != 1 {
			t.Errorf("%s: %+v, want one GET of %d bytes", name, st, c.sent(s.blobs[0]))
		}
	}
}

// TestManyOpenAtOnce: those who begin at the same time fetch what they need beside the layers once between them.
func TestManyOpenAtOnce(t *testing.T) {
	for name, kind := range map[string]verifiable.Options{"index": {Chunk: testChunk}, "tree": {Verity: true}, "whole": {Zstd: true}} {
		s := newShelf(t, kind)
		s.registry.SetLatency(20 * time.Millisecond)
		ref, err := parseRef(s.ref)
		must(t, err)
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				p := &program{stderr: io.Discard, stdout: io.Discard, getenv: func(string) string { return "" }}
				o, err := p.open(t.Context(), &sourceOptions{ref: ref, client: s.options, cacheDir: s.dir, verify: verifyAuto}, slog.New(slog.DiscardHandler))
				if err != nil {
					t.Error(err)
					return
				}
				if err := o.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if st := s.registry.Stats(); st.BlobGETs != 1 {
			t.Errorf("%s: %+v, want one GET of a blob", name, st)
		}
	}
}

// TestKeptOfWholeAnswers: a server that knows no ranges sends more than is to be kept.
func TestKeptOfWholeAnswers(t *testing.T) {
	for name, kinds := range allKinds() {
		if name == "several" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kinds...)
			s.registry.SetFault(fakeregistry.NoRanges().OnBlobs())
			s.fill()
			s.registry.Stop()
			if failed := s.readAll(s.mustOpen(true)); failed > 0 {
				t.Errorf("%d reads failed: %s", failed, s.log.String())
			}
		})
	}
}

// files are those below the cache, by what they are of.
func (s *shelf) files(match func(path string, info fs.FileInfo) bool) (found []string) {
	s.t.Helper()
	must(s.t, filepath.Walk(s.dir, func(path string, info fs.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() && match(path, info) {
			found = append(found, path)
		}
		return err
	}))
	return found
}

// flipOnDisk flips a bit of a file.
func flipOnDisk(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	must(t, err)
	b[0] ^= 8
	_, err = f.WriteAt(b[:], at)
	must(t, errors.Join(err, f.Close()))
}

// TestKeptGoesBad: a bit that flips on disk, in whatever is kept beside a layer, is noticed. Online the right bytes are
// fetched, offline there is an error; never is there a wrong byte.
func TestKeptGoesBad(t *testing.T) {
	const base = 2 << 20 // where a blob begins in its file
	named := func(d digest.Digest) func(string, fs.FileInfo) bool {
		return func(path string, _ fs.FileInfo) bool {
			return strings.HasPrefix(filepath.Base(path), strings.Replace(d.String(), ":", "-", 1))
		}
	}
	treeSize := func(b *verifiable.Blob) int64 { return base + int64(len(b.Data)-b.HashOffset) }
	for name, c := range map[string]struct {
		kind  verifiable.Options
		which func(s *shelf, manifest digest.Digest) func(string, fs.FileInfo) bool
		at    int64 // in the file
	}{
		"manifest": {verifiable.Options{}, func(_ *shelf, m digest.Digest) func(string, fs.FileInfo) bool { return named(m) }, base + 20},
		"index": {verifiable.Options{Chunk: testChunk}, func(s *shelf, _ digest.Digest) func(string, fs.FileInfo) bool {
			return named(digest.FromBytes(s.blobs[0].Index))
		}, base + 50},
		"root of the tree": {verifiable.Options{Verity: true}, func(s *shelf, _ digest.Digest) func(string, fs.FileInfo) bool {
			return func(path string, info fs.FileInfo) bool { return info.Size() == treeSize(s.blobs[0]) }
		}, base + 4096 + 9},
		"zstd, whole": {verifiable.Options{Zstd: true}, func(s *shelf, _ digest.Digest) func(string, fs.FileInfo) bool {
			return named(digest.FromBytes(s.blobs[0].Data))
		}, base + 300_000},
		"record": {verifiable.Options{}, func(s *shelf, _ digest.Digest) func(string, fs.FileInfo) bool {
			return func(path string, _ fs.FileInfo) bool { return filepath.Base(filepath.Dir(path)) == "references" }
		}, 70},
	} {
		t.Run(name, func(t *testing.T) {
			for _, online := range []bool{true, false} {
				s := newShelf(t, c.kind)
				s.fill()
				o := s.mustOpen(true)
				files := s.files(c.which(s, o.image.Digest))
				must(t, o.Close())
				if len(files) != 1 {
					t.Fatalf("found %q", files)
				}
				flipOnDisk(t, files[0], c.at)
				if online {
					// What is damaged is fetched again, and kept: then it is there offline, too.
					for _, offline := range []bool{false, true} {
						o := s.mustOpen(offline)
						if failed := s.readAll(o); failed > 0 {
							t.Errorf("offline %v: %d reads failed", offline, failed)
						}
						must(t, o.Close())
					}
					continue
				}
				s.registry.Stop()
				if o, err := s.open(true); err == nil {
					t.Error("opened offline")
					o.Close()
				} else if !errors.Is(err, errOffline) && !errors.Is(err, errNeverMounted) {
					t.Errorf("offline: %v", err)
				}
			}
		})
	}
}

// A liar brings what is not right.
type liar struct{ data []byte }

func (l liar) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	return io.NopCloser(bytes.NewReader(l.data[off : off+n])), off, int64(len(l.data)), nil
}

type openPart func(o *layerOpener, source *layerSource, b *remoteBlob, v registry.Vouched) (*throughCache, error)

// part is what is kept of the first layer, or beside it.
func (s *shelf) part(open openPart) keptPart {
	s.t.Helper()
	o := s.mustOpen(false)
	opener := &layerOpener{client: o.client, ref: o.ref.registry, image: o.image, cache: o.cache, dir: o.dir, verify: verifyAuto, log: slog.New(slog.DiscardHandler)}
	blob, err := opener.blob(o.image.Layers[0].Descriptor)
	must(s.t, err)
	v, err := o.image.Vouched(o.image.Layers[0])
	must(s.t, err)
	holder, err := open(opener, &layerSource{}, blob, v)
	must(s.t, err)
	must(s.t, errors.Join(holder.Close(), o.Close()))
	return holder.part
}

// TestKeptWasWrong: what an earlier mount kept of a server that sent wrong bytes is found out, removed and fetched
// again; offline it is an error, and the wrong bytes are gone.
func TestKeptWasWrong(t *testing.T) {
	for name, c := range map[string]struct {
		kind verifiable.Options
		part openPart
		at   int
	}{
		"index": {verifiable.Options{Chunk: testChunk}, func(o *layerOpener, source *layerSource, b *remoteBlob, v registry.Vouched) (*throughCache, error) {
			return o.indexHolder(source, b, *v.Index)
		}, 50},
		"tree": {verifiable.Options{Verity: true}, func(o *layerOpener, source *layerSource, b *remoteBlob, v registry.Vouched) (*throughCache, error) {
			return o.treeHolder(source, b, verityRoot(b, *v.Verity))
		}, 4096 + 9},
		"whole": {verifiable.Options{Zstd: true}, func(o *layerOpener, source *layerSource, b *remoteBlob, v registry.Vouched) (*throughCache, error) {
			return o.wholeHolder(source, b)
		}, 300_000},
	} {
		t.Run(name, func(t *testing.T) {
			for _, offline := range []bool{false, true} {
				s := newShelf(t, c.kind)
				s.lie(s.part(c.part), c.at)

				o, err := s.open(offline)
				if !offline {
					must(t, err)
					if failed := s.readAll(o); failed > 0 {
						t.Errorf("%d reads failed", failed)
					}
					must(t, o.Close())
					if !strings.Contains(s.log.String(), "is removed") {
						t.Errorf("log: %s", s.log.String())
					}
					s.fill() // which keeps it anew
					o, err = s.open(true)
					must(t, err)
					if failed := s.readAll(o); failed > 0 {
						t.Errorf("offline after that: %d reads failed", failed)
					}
					must(t, o.Close())
					continue
				}
				if err == nil {
					t.Error("opened offline")
					o.Close()
				} else if !errors.Is(err, errOffline) {
					t.Errorf("offline: %v", err)
				}
			}
		})
	}
}

// TestLeafWasWrong: a part of a tree that was kept wrong is found out while many read, of whom some read another part
// at that moment. All of them get what they want.
func TestLeafWasWrong(t *testing.T) {
	const mib, readers = 1 << 20, 16
	image := imageBytes(40 * mib)
	b := verifiable.Make(t, image, verifiable.Options{Verity: true})
	s := newShelf(t, verifiable.Options{})
	_, err := ocipush.Push(t.Context(), s.registry.URL(), "x:v1", b.Layers(), ocipush.Options{})
	must(t, err)
	s.blobs = []*verifiable.Blob{b}
	o := s.mustOpen(false)
	part := o.layers[0].blob.beside[0].part
	must(t, o.Close())
	if part.size <= 256<<10 {
		t.Fatalf("the tree has %d bytes, which is one part", part.size)
	}
	s.lie(part, int(part.size)-5000)
	o = s.mustOpen(false)
	var all sync.WaitGroup
	for k := range readers {
		all.Go(func() {
			p := make([]byte, mib)
			for at := k * mib; at < len(image); at += readers * mib {
				if err := o.layers[0].blob.ReadAt(context.Background(), p, int64(at)); err != nil {
					t.Errorf("at %d: %v", at, err)
				} else if !bytes.Equal(p, image[at:at+mib]) {
					t.Errorf("wrong bytes at %d", at)
				}
			}
		})
	}
	all.Wait()
	must(t, o.Close())
	if !strings.Contains(s.log.String(), "is removed") {
		t.Error("nothing was found out")
	}
}

// lie has the cache keep the part as a server would send it that changed a bit.
func (s *shelf) lie(part keptPart, at int) {
	s.t.Helper()
	bad := bytes.Clone(s.blobs[0].Data[part.off:])[:part.size]
	bad[at] ^= 1
	c, err := blobcache.New(s.dir, blobcache.Options{})
	must(s.t, err)
	defer c.Close()
	_, err = c.Remove(part.digest)
	must(s.t, err)
	b, err := c.Open(part.digest, part.size, liar{bad}, blobcache.OpenOptions{ChunkSize: part.unit, Origin: part.origin})
	must(s.t, err)
	must(s.t, b.ReadAt(s.t.Context(), make([]byte, part.size), 0))
	must(s.t, b.Close())
}

// TestKeptUntilTheEnd: what an image needs beside its layers counts as used until the mount ends, so that it does not go
// before them.
func TestKeptUntilTheEnd(t *testing.T) {
	s := newShelf(t, verifiable.Options{Chunk: testChunk})
	s.fill()
	used := func() (documents, index time.Time) {
		t.Helper()
		c, err := blobcache.New(s.dir, blobcache.Options{})
		must(t, err)
		defer c.Close()
		list, err := c.List()
		must(t, err)
		for _, k := range list {
			switch k.Digest {
			case digest.FromBytes(s.blobs[0].Index).String():
				index = k.Used
			case digest.FromBytes(s.blobs[0].Data).String():
			default:
				documents = k.Used
			}
		}
		return documents, index
	}
	o := s.mustOpen(false)
	began := time.Now().Truncate(time.Second)
	await := time.NewTimer(time.Until(began.Add(1100 * time.Millisecond))) // times of use are whole seconds
	<-await.C
	must(t, o.layers[0].blob.ReadAt(t.Context(), make([]byte, 10), imageSize-10))
	must(t, o.Close())
	if documents, index := used(); !documents.After(began) || !index.After(began) {
		t.Errorf("mounted at %v; documents were used at %v, the index at %v", began, documents, index)
	}
}

// TestPruneWhileMounted: what a mounted image needs without the registry is in use, and stays.
func TestPruneWhileMounted(t *testing.T) {
	for name, kinds := range map[string][]verifiable.Options{"nothing": {{}}, "index": {{Chunk: testChunk}}, "tree": {{Verity: true}}} {
		s := newShelf(t, kinds...)
		o := s.mustOpen(false)
		s.prune()
		if n := len(s.records()); n != 1 {
			t.Errorf("%s: %d records", name, n)
		}
		again, err := s.open(true)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		must(t, errors.Join(again.Close(), o.Close()))
		s.prune()
		if _, err := s.open(true); !errors.Is(err, errNeverMounted) {
			t.Errorf("%s: unmounted, and pruned: %v", name, err)
		}
	}
}

// prune is what cache prune does.
func (s *shelf) prune() {
	s.t.Helper()
	var stderr bytes.Buffer
	if code := run([]string{"erofs-oci", "cache", "prune", "--cache-dir=" + s.dir}, strings.NewReader(""), io.Discard, &stderr); code != 0 {
		s.t.Errorf("cache prune: %s", stderr.String())
	}
}

// records are the files of what tags led to.
func (s *shelf) records() []string {
	return s.files(func(path string, _ fs.FileInfo) bool { return filepath.Base(filepath.Dir(path)) == "references" })
}

// TestDataGoesFirst: in a long mount what the layer is verified by was read long ago, and goes after all that was read
// since; so an image whose data are here can be mounted offline.
func TestDataGoesFirst(t *testing.T) {
	const mib = 1 << 20
	for name, kind := range map[string]verifiable.Options{"index": {Chunk: testChunk}, "tree": {Verity: true}} {
		s := newShelf(t, kind)
		s.size = "16M"
		o := s.mustOpen(false)
		other := pattern(64 * mib)
		b, err := o.cache.Open(digest.FromString("another").String(), int64(other), other, blobcache.OpenOptions{NoReadahead: true})
		must(t, err)
		for off := int64(0); off < b.Size(); off += mib {
			must(t, b.ReadAt(t.Context(), make([]byte, mib), off))
			if failed := s.readAll(o); failed > 0 {
				t.Fatalf("%d reads failed", failed)
			}
		}
		must(t, o.Close())
		s.registry.Stop()
		o, err = s.open(true)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if failed := s.readAll(o); failed > 0 {
			t.Errorf("%s: %d reads failed", name, failed)
		}
		must(t, o.Close())
	}
}

// A pattern is a blobcache.Fetcher of so many bytes.
type pattern int64

func (p pattern) Fetch(_ context.Context, off, n int64) (io.ReadCloser, int64, int64, error) {
	return io.NopCloser(bytes.NewReader(bytes.Repeat([]byte{7}, int(n)))), off, int64(p), nil
}

// TestNothingKept: a cache without any room is no reason not to mount, and costs no request more at the beginning.
func TestNothingKept(t *testing.T) {
	for name, kinds := range allKinds() {
		if name == "several" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, kinds...)
			s.size = "1"
			for range 2 {
				o := s.mustOpen(false)
				if st := s.registry.Stats(); st.BlobGETs > 1 {
					t.Errorf("%+v", st)
				}
				if failed := s.readAll(o); failed > 0 {
					t.Errorf("%d reads failed", failed)
				}
				must(t, o.Close())
			}
			if _, err := s.open(true); !errors.Is(err, errOffline) {
				t.Errorf("offline: %v", err)
			}
		})
	}
}

// TestRecordsHoldNoSecret: nothing below the cache has what a private registry was told.
func TestRecordsHoldNoSecret(t *testing.T) {
	const name, password = "somebody", "correct horse battery"
	auth := "Basic " + "c29tZWJvZHk6Y29ycmVjdCBob3JzZSBiYXR0ZXJ5"
	s := newShelfAt(t, fakeregistry.Options{Auth: fakeregistry.Basic, Username: name, Password: password}, ocipush.Options{Authorization: auth}, verifiable.Options{Chunk: testChunk})
	s.options.Username, s.options.Password, s.options.PlainHTTP = name, password, true
	s.fill()
	records := 0
	for _, path := range s.files(func(string, fs.FileInfo) bool { return true }) {
		raw, err := os.ReadFile(path)
		must(t, err)
		for _, secret := range []string{name, password, "horse", strings.TrimPrefix(auth, "Basic ")} {
			if bytes.Contains(raw, []byte(secret)) {
				t.Errorf("%s has %q", path, secret)
			}
		}
		info, err := os.Stat(path)
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if filepath.Base(filepath.Dir(path)) == "references" {
			records++
		}
	}
	if records != 1 {
		t.Errorf("%d records", records)
	}
	// Who the user is does not matter where nobody is asked.
	s.options.Username, s.options.Password = "", ""
	if failed := s.readAll(s.mustOpen(true)); failed > 0 {
		t.Errorf("%d reads failed", failed)
	}
}

// TestPruneForgets: records of images that are not kept any more go with them.
func TestPruneForgets(t *testing.T) {
	s := newShelf(t, verifiable.Options{})
	s.fill()
	records := func() int { return len(s.records()) }
	cache := func(args ...string) {
		t.Helper()
		var stderr bytes.Buffer
		if code := run(append([]string{"erofs-oci", "cache"}, args...), strings.NewReader(""), io.Discard, &stderr); code != 0 {
			t.Errorf("cache %q: %s", args, stderr.String())
		}
	}
	o := s.mustOpen(true)
	manifest, layer := o.image.Digest, o.image.Layers[0].Digest
	must(t, o.Close())
	cache("rm", "--cache-dir="+s.dir, layer.String())
	if n := records(); n != 1 {
		t.Errorf("the layer is removed: %d records", n)
	}
	cache("rm", "--cache-dir="+s.dir, manifest.String())
	if n := records(); n != 0 {
		t.Errorf("the manifest is removed: %d records", n)
	}
	s.fill()
	cache("prune", "--cache-dir="+s.dir)
	if n := records(); n != 0 {
		t.Errorf("all is removed: %d records", n)
	}
}
