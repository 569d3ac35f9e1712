package main

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
	"github.com/erofs-oci/erofs-oci/tests/verifiable"
)

// TestUnverifiedIndexWasWrong: with --verify=off a wrong chunk index may be kept, but not for longer than until the
// registry sends the right one.
func TestUnverifiedIndexWasWrong(t *testing.T) {
	// An index begins with its magic, and its second entry with where the second chunk is in the blob.
	for name, at := range map[string]int{"it does not parse": 0, "its version is unknown": 4, "it lies about a place": 32 + 48} {
		for _, apart := range []bool{false, true} {
			s := newShelf(t, verifiable.Options{Chunk: testChunk, Zstd: true, Apart: apart})
			s.verify = verifyOff
			holder, bit := s.blobs[0].Index, at
			if !apart {
				holder, bit = s.blobs[0].Data, at+s.blobs[0].IndexOffset+8 // it is framed
			}
			s.registry.SetFault(onBlob(holder, fakeregistry.FlipBit(int64(bit))))
			if o, err := s.open(false); err == nil {
				s.failed(o)
				must(t, o.Close())
			}
			s.registry.SetFault(nil)
			for _, indexes := range []int{1, 0} {
				o := s.mustOpen(false)
				if st := s.registry.Stats(); st.BlobGETs != indexes {
					t.Errorf("%s, apart %v: %+v, want %d GETs of an index", name, apart, st, indexes)
				}
				if failed := s.readAll(o); failed > 0 {
					t.Errorf("%s, apart %v: %d reads failed", name, apart, failed)
				}
				must(t, o.Close())
			}
		}
	}
}

// onBlob has the GETs of one blob meet a fault.
func onBlob(blob []byte, f fakeregistry.Fault) fakeregistry.Plan {
	return func(req *http.Request) *fakeregistry.Fault {
		if !strings.HasSuffix(req.URL.Path, "/blobs/"+digest.FromBytes(blob).String()) {
			return nil
		}
		return &f
	}
}

// failed is how many pieces of the layers cannot be read, whatever the others are.
func (s *shelf) failed(o *opened) (n int) {
	for _, l := range o.layers {
		for off := int64(0); off < l.blob.Size(); off += 100_000 {
			if l.blob.ReadAt(context.Background(), make([]byte, min(100_000, l.blob.Size()-off)), off) != nil {
				n++
			}
		}
	}
	return n
}
