package tarlayer

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/ulikunitz/xz"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// archive is a tar archive of some size.
func archive(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range []string{"a", "b", "c"} {
		data := []byte(strings.Repeat("some text of "+name+"\n", 20000))
		if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}), second(w.Write(data))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func second(_ int, err error) error { return err }

// compressed are the forms of data that layers have.
func compressed(t testing.TB, data []byte) map[Compression][]byte {
	t.Helper()
	through := func(open func(io.Writer) (io.WriteCloser, error), parts ...[]byte) []byte {
		var b bytes.Buffer
		for _, p := range parts {
			w, err := open(&b)
			if err == nil {
				err = errors.Join(second(w.Write(p)), w.Close())
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		return b.Bytes()
	}
	half := len(data) / 2
	forms := map[Compression][]byte{
		None: data,
		// Of several members and frames, as parallel compressors and chunked layers have them.
		Gzip: through(func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }, data[:half], data[half:]),
		Zstd: append([]byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'a', 'b', 'c'},
			through(func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }, data[:half], data[half:])...),
		XZ: through(func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }, data),
	}
	if bzip2, err := exec.LookPath("bzip2"); err == nil { // the standard library only reads it
		cmd := exec.Command(bzip2, "-c")
		cmd.Stdin = bytes.NewReader(data)
		if forms[Bzip2], err = cmd.Output(); err != nil {
			t.Fatal(err)
		}
	}
	return forms
}

func describe(blob []byte) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob))}
}

func TestRead(t *testing.T) {
	data := archive(t)
	for kind, blob := range compressed(t, data) {
		for name, r := range map[string]io.Reader{"whole": bytes.NewReader(blob), "byte by byte": iotest.OneByteReader(bytes.NewReader(blob)), "end with data": iotest.DataErrReader(bytes.NewReader(blob))} {
			l, err := Open(r, describe(blob), digest.FromBytes(data))
			if err != nil {
				t.Fatalf("%s, %s: %v", kind, name, err)
			}
			got, err := io.ReadAll(l)
			if err != nil || !bytes.Equal(got, data) || l.Compression() != kind || l.Size() != int64(len(data)) {
				t.Errorf("%s, %s: %d bytes of %d, as %s: %v", kind, name, len(got), len(data), l.Compression(), err)
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if n, err := l.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("%s, %s: after the end %d, %v", kind, name, n, err)
			}
		}
	}
}

// TestBzip2 makes sure that the form that needs a program was among those of TestRead.
func TestBzip2(t *testing.T) {
	require.Has(t, "bzip2")
	if compressed(t, archive(t))[Bzip2] == nil {
		t.Error("no archive was made")
	}
}

// TestMismatch: whatever bit of a layer is wrong, its end is an error.
func TestMismatch(t *testing.T) {
	data := archive(t)
	other := digest.FromString("another")
	for kind, blob := range compressed(t, data) {
		behind := append(bytes.Clone(blob), 0)
		longer := describe(blob)
		longer.Size++
		for name, c := range map[string]struct {
			blob   []byte
			desc   ocispec.Descriptor
			diffID digest.Digest
		}{
			"another digest":       {blob, ocispec.Descriptor{Digest: other, Size: int64(len(blob))}, digest.FromBytes(data)},
			"another diff ID":      {blob, describe(blob), other},
			"another size":         {blob, longer, digest.FromBytes(data)},
			"cut short":            {blob[:len(blob)-1], describe(blob), digest.FromBytes(data)},
			"a byte behind it":     {behind, describe(blob), digest.FromBytes(data)},
			"the first half of it": {blob[:len(blob)/2], describe(blob), ""},
			"nothing":              {nil, describe(blob), digest.FromBytes(data)},
		} {
			l, err := Open(bytes.NewReader(c.blob), c.desc, c.diffID)
			if err == nil {
				_, err = io.Copy(io.Discard, l)
				if _, again := l.Read(make([]byte, 1)); err != nil && again == nil {
					t.Errorf("%s, %s: the error was forgotten", kind, name)
				}
				l.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.desc.Digest.String()) {
				t.Errorf("%s, %s: %v, which does not say which layer is wrong", kind, name, err)
			}
		}
	}
}

// TestFlippedBits: a bit that is wrong in a compressed layer is noticed by the digest, if not before.
func TestFlippedBits(t *testing.T) {
	require.Long(t, "reads layers with wrong bits")
	data := archive(t)
	for kind, blob := range compressed(t, data) {
		for at := 0; at < len(blob); at += 1 + len(blob)/40 {
			bad := bytes.Clone(blob)
			bad[at] ^= 0x10
			l, err := Open(bytes.NewReader(bad), describe(blob), digest.FromBytes(data))
			if err == nil {
				_, err = io.Copy(io.Discard, l)
				l.Close()
			}
			if err == nil {
				t.Errorf("%s: a bit of byte %d was flipped, and nobody said so", kind, at)
			}
		}
	}
}

// TestUnknown: of a file without a descriptor nothing is compared.
func TestUnknown(t *testing.T) {
	data := archive(t)
	for kind, blob := range compressed(t, data) {
		l, err := Open(bytes.NewReader(blob), ocispec.Descriptor{}, "")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(l); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v", kind, len(got), err)
		}
	}
}

// TestEmpty: a blob without a byte is an archive without an entry, and a short one is what it is.
func TestEmpty(t *testing.T) {
	for _, c := range []struct {
		blob   string
		desc   ocispec.Descriptor
		diffID digest.Digest
		want   error
	}{
		{"", describe(nil), digest.FromBytes(nil), nil},
		{"", describe(nil), "", nil},
		{"", ocispec.Descriptor{}, "", nil},
		{"", describe(nil), digest.FromString("something"), ErrMismatch},
		{"", describe([]byte("a")), "", ErrMismatch},
		{"abc", ocispec.Descriptor{}, "", nil},
		{"abc", describe([]byte("abc")), digest.FromString("abc"), nil},
		{"\x1f\x8b", ocispec.Descriptor{}, "", io.ErrUnexpectedEOF},
		{"\xfd7zXZ\x00", ocispec.Descriptor{}, "", io.ErrUnexpectedEOF},
		{"\x28\xb5\x2f\xfd", ocispec.Descriptor{}, "", io.ErrUnexpectedEOF},
		{"BZh", ocispec.Descriptor{}, "", io.ErrUnexpectedEOF},
	} {
		l, err := Open(strings.NewReader(c.blob), c.desc, c.diffID)
		var got []byte
		if err == nil {
			got, err = io.ReadAll(l)
			if c.want == nil && (string(got) != c.blob || l.Size() != int64(len(c.blob)) || l.Compression() != None) {
				t.Errorf("%q: %q, %d bytes, %s", c.blob, got, l.Size(), l.Compression())
			}
			l.Close()
		}
		if !errors.Is(err, c.want) {
			t.Errorf("%q as %v: %v, want %v", c.blob, c.desc.Digest, err, c.want)
		}
	}
}

func TestCheck(t *testing.T) {
	for mediaType, want := range map[string]string{
		"application/vnd.oci.image.layer.v1.tar+gzip":                  "",
		"application/vnd.oci.image.layer.v1.tar":                       "",
		"application/vnd.oci.image.layer.v1.tar+zstd":                  "",
		"application/vnd.docker.image.rootfs.diff.tar.gzip":            "",
		"application/vnd.docker.image.rootfs.diff.tar.zstd":            "",
		"application/x-whatever":                                       "",
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    "from its vendor",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "from its vendor",
		"application/vnd.oci.image.layer.v1.tar+gzip+encrypted":        "encrypted",
		"application/vnd.erofs":                                        "EROFS",
		"application/vnd.erofs.layer.v1+zstd":                          "EROFS",
		"application/x.stacker.erofs":                                  "EROFS",
		"application/vnd.in-toto+json":                                 "not a file system",
	} {
		if err := Check(mediaType); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", mediaType, err, want)
		}
	}
	if _, err := Open(nil, ocispec.Descriptor{Digest: "sha256:../../etc"}, ""); err == nil {
		t.Error("a digest that is none was taken")
	}
}

// FuzzOpen: bytes that are no layer give an error, and never more than the limit of memory.
func FuzzOpen(f *testing.F) {
	for _, blob := range compressed(f, []byte("a few words, which are no archive")) {
		f.Add(blob)
	}
	for _, blob := range xzBlocks(f) {
		f.Add(blob)
	}
	f.Fuzz(func(t *testing.T, blob []byte) {
		l, err := Open(bytes.NewReader(blob), ocispec.Descriptor{}, "")
		if err != nil {
			return
		}
		defer l.Close()
		const most = 32 << 20
		if n, err := io.CopyN(io.Discard, l, most); err == nil && n != most {
			t.Errorf("%d bytes and no end", n)
		}
	})
}
