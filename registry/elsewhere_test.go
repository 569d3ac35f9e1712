package registry_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

// TestFetchElsewhere: bytes that a mirror gave, and that were wrong, come from the registry;
// and so does all that follows, for a while.
func TestFetchElsewhere(t *testing.T) {
	m := newMirrored(t, "", registry.Options{})
	b := m.blob(t)
	if b.Places() != 2 {
		t.Errorf("%d places", b.Places())
	}
	m.mirror.SetFault(fakeregistry.Always(fakeregistry.FlipBit(1000)).OnBlobs())
	got, _, err := fetch(t.Context(), b, 500, 1000)
	if err != nil || bytes.Equal(got, m.data[500:1500]) {
		t.Fatalf("the mirror does not lie: %v", err)
	}
	why := errors.New("its digest is another")
	body, start, total, err := b.FetchElsewhere(t.Context(), 500, 1000, why)
	if err != nil || start != 500 || total != int64(len(m.data)) {
		t.Fatalf("from %d of %d: %v", start, total, err)
	}
	defer body.Close()
	if got, err = io.ReadAll(body); err != nil || !bytes.Equal(got, m.data[500:1500]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if _, _, err := fetch(t.Context(), b, 0, 10); err != nil {
		t.Error(err)
	}
	if here, there := len(blobGETs(m.mirror)), len(blobGETs(m.primary)); here != 1 || there != 2 {
		t.Errorf("%d GETs at the mirror and %d at the registry, want 1 and 2", here, there)
	}
	if said := m.log.String(); !strings.Contains(said, why.Error()) || !strings.Contains(said, "mirror left") {
		t.Errorf("the log says %q", said)
	}
}

// TestFetchElsewhereAlone: without a mirror it is a second try at the registry.
func TestFetchElsewhereAlone(t *testing.T) {
	r := startRegistry(t, fakeregistry.Options{SignedURLs: 1 << 40})
	data := noise(3000)
	b := blobOf(t, r, data, registry.Options{})
	if _, _, err := fetch(t.Context(), b, 0, 100); err != nil {
		t.Fatal(err)
	}
	r.ResetStats()
	body, _, _, err := b.FetchElsewhere(t.Context(), 0, 100, errors.New("wrong"))
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, data[:100]) || b.Places() != 1 {
		t.Errorf("%d bytes of %d places, %v", len(got), b.Places(), err)
	}
	// The storage may have been the liar: the registry is asked for it anew.
	if n := len(blobGETs(r)); n != 1 {
		t.Errorf("%d GETs at the registry, want 1", n)
	}
}
