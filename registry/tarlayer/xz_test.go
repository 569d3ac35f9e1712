package tarlayer

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"

	"github.com/erofs-oci/erofs-oci/tests/require"
)

// xzBlocks are what xz 5.4.1 makes of xzText, by --check: xz -T2 --block-size=300. So there are three blocks, whose
// headers have the sizes.
func xzBlocks(t testing.TB) map[string][]byte {
	forms := make(map[string][]byte)
	for check, text := range map[string]string{
		"none":   "/Td6WFoAAAD/EtlBA8AgrAIhARYAAAAAFc487+ABKwAYXQAYDEKSame8DtEzLOTMQinAnEqPfnixAAAAA8AgrAIhARYAAAAAFc487+ABKwAYXQAxmQjed3mbLSn6i1B6YSY0t99icSl1QAAAA8AfKCEBFgAAAAAAy0pKBOAAJwAXXQAcDkinGbZ9TSFDZvWI4diBEi69uTrAAAAAAAMwrAIwrAIvKAAARNsDuA3TVjcDAAAAAABZWg==",
		"crc32":  "/Td6WFoAAAFpIt42A8AgrAIhARYAAAAAFc487+ABKwAYXQAYDEKSame8DtEzLOTMQinAnEqPfnixAAAAQHH9oQPAIKwCIQEWAAAAABXOPO/gASsAGF0AMZkI3nd5my0p+otQemEmNLffYnEpdUAAACc+bSQDwB8oIQEWAAAAAADLSkoE4AAnABddABwOSKcZtn1NIUNm9Yjh2IESLr25OsAAAADFHYsqAAM0rAI0rAIzKAAACrdoX5vjUUADAAAAAAFZWg==",
		"crc64":  "/Td6WFoAAATm1rRGA8AgrAIhARYAAAAAFc487+ABKwAYXQAYDEKSame8DtEzLOTMQinAnEqPfnixAAAASpbBdERnUc4DwCCsAiEBFgAAAAAVzjzv4AErABhdADGZCN53eZstKfqLUHphJjS332JxKXVAAACIb2o6SPIEqAPAHyghARYAAAAAAMtKSgTgACcAF10AHA5Ipxm2fU0hQ2b1iOHYgRIuvbk6wAAAAGD8VTrISdXlAAM4rAI4rAI3KAAAp6qWDRQXOzADAAAAAARZWg==",
		"sha256": "/Td6WFoAAArh+wyhA8AgrAIhARYAAAAAFc487+ABKwAYXQAYDEKSame8DtEzLOTMQinAnEqPfnixAAAAiJTaNZt9b0BR+ApPrckNqrMGoBIk1NA5dKVb2bnCXHQDwCCsAiEBFgAAAAAVzjzv4AErABhdADGZCN53eZstKfqLUHphJjS332JxKXVAAAAZHC6rYHVbiYIm0D5B2++WmUvLu+r8NF58EQjzg14CWQPAHyghARYAAAAAAMtKSgTgACcAF10AHA5Ipxm2fU0hQ2b1iOHYgRIuvbk6wAAAAF9E2joqS8yhQESI/IqO8Lmz+43GHMDYfLpj3cLm8VOaAANQrAJQrAJPKAAA0mR02RM6g9cDAAAAAApZWg==",
	} {
		var err error
		if forms[check], err = base64.StdEncoding.DecodeString(text); err != nil {
			t.Fatal(err)
		}
	}
	return forms
}

var xzText = strings.Repeat("0123456789abcdef", 40)

func readXZ(blob []byte, most int64) ([]byte, error) {
	r, err := newXZReader(bufio.NewReader(bytes.NewReader(blob)))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(r, most))
}

func libraryXZ(blob []byte, most int64) ([]byte, error) {
	r, err := xz.NewReader(bytes.NewReader(blob))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(r, most))
}

func TestXZStreams(t *testing.T) {
	for check, blob := range xzBlocks(t) {
		zeros := make([]byte, 8)
		for _, c := range []struct {
			name string
			blob []byte
			want int // times the text; 0 for an error
		}{
			{"one", blob, 1},
			{"two", bytes.Join([][]byte{blob, blob}, nil), 2},
			{"with zeros", bytes.Join([][]byte{blob, zeros, blob, zeros[:4]}, nil), 2},
			{"with three zeros", bytes.Join([][]byte{blob, zeros[:3]}, nil), 0},
			{"with five zeros between", bytes.Join([][]byte{blob, zeros[:5], blob}, nil), 0},
			{"something behind", bytes.Join([][]byte{blob, []byte("something else")}, nil), 0},
			{"a block twice", bytes.Join([][]byte{blob[:68], blob[12:]}, nil), 0},
		} {
			got, err := readXZ(c.blob, 1<<20)
			if c.want == 0 {
				if err == nil {
					t.Errorf("%s, %s: %d bytes were taken", check, c.name, len(got))
				}
			} else if err != nil || string(got) != strings.Repeat(xzText, c.want) {
				t.Errorf("%s, %s: %d bytes, %v", check, c.name, len(got), err)
			}
		}
		for n := range blob {
			if _, err := readXZ(blob[:n], 1<<20); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s: the first %d bytes: %v", check, n, err)
			}
		}
	}
}

// asLibrary says in what a reading differs from the library's. That takes a header that is cut off for the end, and says
// nothing; else there is to be no difference.
func asLibrary(blob, got []byte, err error, most int64) error {
	want, wantErr := libraryXZ(blob, most)
	switch {
	case err == nil && wantErr != nil:
		return fmt.Errorf("%d bytes, where the library says %w", len(got), wantErr)
	case err != nil && wantErr == nil && !errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w, where the library has %d bytes", err, len(want))
	case wantErr == nil && !bytes.Equal(got, want):
		return fmt.Errorf("%d bytes, where the library has %d others", len(got), len(want))
	}
	return nil
}

// TestXZFlippedBits: a bit that is wrong is noticed, but for one of how long LZMA2 data is, in its own header, since the
// library reads as much as it needs.
func TestXZFlippedBits(t *testing.T) {
	require.Long(t, "reads layers with wrong bits")
	sizes := map[string]int{"none": 0, "crc32": 4, "crc64": 8, "sha256": 32}
	for check, blob := range xzBlocks(t) {
		for bit := range 8 * len(blob) {
			bad := bytes.Clone(blob)
			bad[bit/8] ^= 1 << (bit % 8)
			got, err := readXZ(bad, 1<<20)
			if err == nil && check != "none" {
				// A block has 16 bytes of header, 32 of data with its zeros, and the check.
				at := (bit/8-12)%(16+32+sizes[check]) - 16
				if string(got) != xzText || at != 3 && at != 4 {
					t.Errorf("%s, bit %d: %d bytes, and no error", check, bit, len(got))
				}
			}
			if bit%37 == 0 { // the library takes its time
				if err := asLibrary(bad, got, err, 1<<20); err != nil {
					t.Errorf("%s, bit %d: %v", check, bit, err)
				}
			}
		}
	}
}

// TestXZDictionary: no block may ask for a large dictionary, and none gets one that it has no use for.
func TestXZDictionary(t *testing.T) {
	blob := xzBlocks(t)["crc64"]
	two := bytes.Join([][]byte{blob, blob}, nil)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, at := range []int{12, 68, 124, 12 + len(blob), 124 + len(blob)} { // headers of blocks
		for code, ok := range map[byte]bool{0x1e: true, 0x1f: false, 0x28: false} { // 128, 192, 4096 MiB
			big := bytes.Clone(two)
			header := big[at : at+16]
			header[bytes.Index(header, []byte{0x21, 1, 0x16})+2] = code
			binary.LittleEndian.PutUint32(header[12:], crc32.ChecksumIEEE(header[:12]))
			got, err := readXZ(big, 1<<20)
			if ok && (err != nil || len(got) != 2*len(xzText)) || !ok && !errors.Is(err, errDictionary) {
				t.Errorf("block at %d, dictionary %#x: %d bytes, %v", at, code, len(got), err)
			}
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 32<<20 {
		t.Errorf("%d bytes of memory for blocks of 300", n)
	}
}

// FuzzXZ: what is read is what the library's reader reads.
func FuzzXZ(f *testing.F) {
	for _, blob := range xzBlocks(f) {
		f.Add(blob)
		f.Add(bytes.Join([][]byte{blob, make([]byte, 4), blob}, nil))
	}
	f.Add(compressed(f, []byte("a few words"))[XZ])
	f.Fuzz(func(t *testing.T, blob []byte) {
		const most = 1 << 20
		got, err := readXZ(blob, most)
		if errors.Is(err, errDictionary) {
			return
		}
		if err := asLibrary(blob, got, err, most); err != nil {
			t.Error(err)
		}
	})
}
