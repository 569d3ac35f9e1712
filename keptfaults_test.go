package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/ocipush"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// TestOneWrongAnswer: what came wrong once, while all else is here, goes by itself, and comes anew; then all is here.
func TestOneWrongAnswer(t *testing.T) {
	const mib = 1 << 20
	image := imageBytes(40 * mib) // with a tree of two parts
	tree := verifiable.Make(t, image, verifiable.Options{Verity: true})
	index := verifiable.Make(t, imageBytes(imageSize), verifiable.Options{Chunk: testChunk})
	for name, c := range map[string]struct {
		blob *verifiable.Blob
		bit  int64
		gets int // beside those of data
	}{
		"tree":  {tree, int64(len(tree.Data) - 5000), 3},
		"index": {index, int64(index.IndexOffset + 50), 2},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, verifiable.Options{})
			_, err := ocipush.Push(t.Context(), s.registry.URL(), "x:v1", c.blob.Layers(), ocipush.Options{})
			must(t, err)
			s.blobs, s.want = []*verifiable.Blob{c.blob}, [][]byte{c.blob.Plain[:max(c.blob.HashOffset, 0)]}
			if c.blob.HashOffset == 0 {
				s.want[0] = c.blob.Plain
			}
			end := int64(c.blob.HashOffset + c.blob.IndexOffset) // of the data
			flip, flips := fakeregistry.FlipBit(c.bit), 0
			s.registry.SetFault(func(req *http.Request) *fakeregistry.Fault {
				var first, last int64
				if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil || first < end {
					return nil
				}
				if c.bit < first || c.bit > last || flips > 0 {
					return nil
				}
				flips++
				return &flip
			})
			s.fill()
			if strings.Contains(s.log.String(), "is removed") || strings.Count(s.log.String(), "they are fetched again") != 1 {
				t.Errorf("log: %s", s.log.String())
			}
			if asked := s.ranges(end); flips != 1 || len(asked) != c.gets {
				t.Errorf("%d wrong answers; requests %q", flips, asked)
			}
			s.registry.Stop()
			if failed := s.readAll(s.mustOpen(true)); failed > 0 {
				t.Errorf("%d reads failed offline", failed)
			}
		})
	}
}

// ranges are those that were asked for from off on.
func (s *shelf) ranges(off int64) (all []string) {
	for _, r := range s.registry.Requests() {
		var first, last int64
		if _, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &first, &last); err == nil && first >= off {
			all = append(all, r.Range)
		}
	}
	return all
}

// TestKeptIsToBlame: where an earlier mount kept a wrong part, the others stay, and nobody says that the registry is at
// fault.
func TestKeptIsToBlame(t *testing.T) {
	const mib = 1 << 20
	b := verifiable.Make(t, imageBytes(40*mib), verifiable.Options{Verity: true})
	s := newShelf(t, verifiable.Options{})
	_, err := ocipush.Push(t.Context(), s.registry.URL(), "x:v1", b.Layers(), ocipush.Options{})
	must(t, err)
	s.blobs, s.want = []*verifiable.Blob{b}, [][]byte{b.Plain[:b.HashOffset]}
	s.fill()
	o := s.mustOpen(false)
	part := o.layers[0].blob.beside[0].part
	must(t, o.Close())
	s.lie(part, int(part.size)-5000)
	s.fill()
	if asked := s.ranges(int64(b.HashOffset)); len(asked) != 1 {
		t.Errorf("requests for the tree: %q, want one", asked)
	}
	if log := s.log.String(); strings.Count(log, "is removed") != 1 || strings.Contains(log, "bytes of a blob are wrong") {
		t.Errorf("log: %s", log)
	}
	s.registry.Stop()
	if failed := s.readAll(s.mustOpen(true)); failed > 0 {
		t.Errorf("%d reads failed offline", failed)
	}
}
