package main

import (
	"io"
	"log/slog"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// BenchmarkColdRead reads an image of 64 MiB from front to back, out of a registry on this
// machine, whose own work is in the figures.
func BenchmarkColdRead(b *testing.B) {
	image := imageBytes(64 << 20)
	for _, c := range []struct {
		name   string
		o      verifiable.Options
		verify string
	}{
		{"off", verifiable.Options{}, verifyOff},
		{"index", verifiable.Options{Chunk: 256 << 10}, verifyAuto},
		{"tree", verifiable.Options{Verity: true}, verifyAuto},
		{"zstd", verifiable.Options{Chunk: 256 << 10, Zstd: true}, verifyAuto},
	} {
		blob := verifiable.Make(b, image, c.o)
		r, err := fakeregistry.New(fakeregistry.Options{})
		if err != nil {
			b.Fatal(err)
		}
		defer r.Close()
		if _, err := ocipush.Push(b.Context(), r.URL(), "x:v1", blob.Layers(), ocipush.Options{}); err != nil {
			b.Fatal(err)
		}
		b.Run(c.name, func(b *testing.B) {
			r.ResetStats()
			b.SetBytes(int64(len(image)))
			before := cpu(b)
			for range b.N {
				coldRead(b, r, c.verify, len(image))
			}
			n := float64(b.N)
			b.ReportMetric((cpu(b)-before)/n, "cpu-ms/op")
			b.ReportMetric(float64(r.Stats().BlobGETs)/n, "GETs/op")
			b.ReportMetric(float64(r.Stats().BlobBytes)/n, "fetched-B/op")
		})
	}
}

func coldRead(b *testing.B, r *fakeregistry.Registry, verify string, size int) {
	client, err := registry.New(registry.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	ref, err := registry.ParseReference(r.Addr() + "/x:v1")
	if err != nil {
		b.Fatal(err)
	}
	im, err := client.Resolve(b.Context(), ref, registry.Selector{})
	if err != nil {
		b.Fatal(err)
	}
	cache, err := blobcache.New(b.TempDir(), blobcache.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer cache.Close()
	o := &layerOpener{client: client, ref: ref, image: im, cache: cache, verify: verify, log: slog.New(slog.DiscardHandler), onWrong: func(err error) { b.Error(err) }}
	l, err := o.open(b.Context(), im.Layers[0])
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	p := make([]byte, 1<<20)
	for off := 0; off < size; off += len(p) {
		if err := l.ReadAt(b.Context(), p, int64(off)); err != nil {
			b.Fatal(err)
		}
	}
}

// cpu is what this process has used so far, in ms.
func cpu(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e6
}

// BenchmarkOpenAgain opens and closes an image that was read before, with a chunk index, by its tag.
func BenchmarkOpenAgain(b *testing.B) {
	blob := verifiable.Make(b, imageBytes(imageSize), verifiable.Options{Chunk: testChunk})
	r, err := fakeregistry.New(fakeregistry.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	if _, err := ocipush.Push(b.Context(), r.URL(), "x:v1", blob.Layers(), ocipush.Options{}); err != nil {
		b.Fatal(err)
	}
	ref, err := parseRef(r.Addr() + "/x:v1")
	if err != nil {
		b.Fatal(err)
	}
	dir := filepath.Join(b.TempDir(), "cache")
	open := func() {
		p := &program{stderr: io.Discard, stdout: io.Discard, getenv: func(string) string { return "" }}
		o, err := p.open(b.Context(), &sourceOptions{ref: ref, cacheDir: dir, verify: verifyAuto}, slog.New(slog.DiscardHandler))
		if err == nil {
			err = o.Close()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	open()
	r.ResetStats()
	before := cpu(b)
	for range b.N {
		open()
	}
	b.ReportMetric((cpu(b)-before)/float64(b.N), "cpu-ms/op")
	b.ReportMetric(float64(r.Stats().ManifestGETs+r.Stats().BlobGETs)/float64(b.N), "GETs/op")
}
