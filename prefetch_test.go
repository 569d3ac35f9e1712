package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry/integrity"
	"github.com/erofs-oci/erofs-oci/registry/profile"
)

// What a mount was told is what another server of it does; without its profile that fetches nothing, and says so.
func TestRecordedPrefetch(t *testing.T) {
	p, err := profile.New([]profile.Blob{{Digest: "sha256:" + strings.Repeat("0", 64), Size: 10, Reads: []profile.Read{{Off: 1, Len: 2}}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "profile")
	if err := profile.WriteFile(file, p); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		how         prefetchOptions
		rate, bytes int64
		file        bool
	}{
		{how: prefetchOptions{}},
		{how: prefetchOptions{mode: "meta"}},
		{how: prefetchOptions{mode: "all", rate: "1MiB", budget: "3G"}, rate: 1 << 20, bytes: 3 << 30},
		{how: prefetchOptions{mode: file, budget: "4096"}, bytes: 4096, file: true},
	} {
		a := (&sourceOptions{prefetch: c.how}).access()
		var said strings.Builder
		got := recordedPrefetch(a, slog.New(slog.NewTextHandler(&said, nil)))
		if got.mode != c.how.mode || got.bytesPerSecond != c.rate || got.bytes != c.bytes || (got.profile != nil) != c.file || said.Len() > 0 {
			t.Errorf("%+v: %+v, %s", c.how, got, said.String())
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	got := recordedPrefetch(backend.Access{Prefetch: file, PrefetchRate: "1MiB"}, slog.New(slog.NewTextHandler(&said, nil)))
	if got.wanted() || !strings.Contains(said.String(), file) || strings.Count(said.String(), "\n") != 1 {
		t.Errorf("%+v, %q", got, said.String())
	}
}

func TestCutPieces(t *testing.T) {
	for _, c := range []struct{ off, n int64 }{{0, 0}, {5, 1}, {4096, prefetchPiece}, {4096, prefetchPiece + 1}, {0, 3*prefetchPiece - 1}} {
		next := c.off
		pieces := cutPieces(nil, nil, c.off, c.n)
		for _, p := range pieces {
			if p.off != next || p.n <= 0 || p.n > prefetchPiece {
				t.Errorf("%+v: %+v", c, pieces)
			}
			next += p.n
		}
		if next != c.off+c.n || int64(len(pieces)) != (c.n+prefetchPiece-1)/prefetchPiece {
			t.Errorf("%+v: %+v", c, pieces)
		}
	}
}

// Bytes that are wrong are told from a network in trouble.
func TestIsRefused(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{nil, false}, {errors.New("something"), false}, {&net.DNSError{IsTemporary: true}, false},
		{fmt.Errorf("chunk: %w", judged{}), true}, {errors.Join(integrity.ErrCorrupt, os.ErrClosed), false},
	} {
		if got := isRefused(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}

type judged struct{}

func (judged) Error() string   { return "judged" }
func (judged) Temporary() bool { return true }
