package profile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

const version = 1

// What is refused before it takes memory: a read has 30 bytes of a file at most, mostly.
const (
	maxFile  = 64 << 20
	maxReads = 1 << 20
	maxBlobs = 10_000
)

// A FormatError says what is wrong with a profile, and after how many bytes of it.
type FormatError struct {
	Off int64
	Err error
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("not a profile, at byte %d: %v", e.Off, e.Err)
}

func (e *FormatError) Unwrap() error { return e.Err }

// ReadFile reads a profile from a regular file. Anything else could keep its reader waiting, for ever perhaps: a pipe
// that nobody writes to does so when it is opened.
func ReadFile(name string) (*Profile, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() // nothing was written
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: it is not a regular file", name)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	p, err := Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}

// Parse reads a profile. An error of the format is a *FormatError.
func Parse(raw []byte) (*Profile, error) {
	if len(raw) > maxFile {
		return nil, &FormatError{maxFile, fmt.Errorf("it has more than %d bytes", maxFile)}
	}
	p := &parser{tokens: json.NewDecoder(bytes.NewReader(raw))}
	p.tokens.UseNumber()
	blobs, err := p.profile()
	if err == nil {
		if _, next := p.tokens.Token(); next != io.EOF {
			err = errors.New("something follows it")
		}
	}
	var made *Profile
	if err == nil {
		made, err = New(blobs)
	}
	if err != nil {
		return nil, &FormatError{p.tokens.InputOffset(), err}
	}
	return made, nil
}

// A parser walks over tokens: so it takes no memory for what it does not know, and sees a key that is there twice.
type parser struct {
	tokens *json.Decoder
	reads  int
}

func (p *parser) profile() (blobs []Blob, err error) {
	seen := map[string]bool{}
	err = p.object(func(key string) error {
		switch {
		case key == "version" && len(seen) == 0:
			return p.version()
		case key == "blobs":
			return p.object(func(digest string) error {
				b, err := p.blob(digest)
				blobs = append(blobs, b)
				return err
			}, map[string]bool{}, maxBlobs)
		}
		return fmt.Errorf("%.80q is not known, or not where it should be", key)
	}, seen, 2)
	if err == nil && !(seen["version"] && seen["blobs"]) {
		err = errors.New("it does not have both, version and blobs")
	}
	return blobs, err
}

func (p *parser) version() error {
	v, err := p.integer(math.MaxInt64)
	if err == nil && v != version {
		err = fmt.Errorf("it has version %d, and only version %d is known here", v, version)
	}
	return err
}

func (p *parser) blob(digest string) (b Blob, err error) {
	b.Digest = digest
	seen := map[string]bool{}
	err = p.object(func(key string) (err error) {
		switch key {
		case "size":
			b.Size, err = p.integer(math.MaxInt64)
		case "reads":
			b.Reads, err = p.readList()
		default:
			err = fmt.Errorf("%.80q of a blob is not known", key)
		}
		return err
	}, seen, 2)
	if err == nil && !(seen["size"] && seen["reads"]) {
		err = errors.New("a blob does not have both, size and reads")
	}
	if err == nil {
		err = b.check()
	}
	return b, err
}

func (p *parser) readList() (reads []Read, err error) {
	if err := p.delim('['); err != nil {
		return nil, err
	}
	for p.tokens.More() {
		if p.reads++; p.reads > maxReads {
			return nil, fmt.Errorf("it has more than %d reads", maxReads)
		}
		r, err := p.read()
		if err != nil {
			return nil, err
		}
		reads = append(reads, r)
	}
	return reads, p.delim(']')
}

// read reads [order,offset,length].
func (p *parser) read() (r Read, err error) {
	if err := p.delim('['); err != nil {
		return r, err
	}
	order, err := p.integer(maxOrder)
	if err != nil {
		return r, err
	}
	r.Order = int(order)
	if r.Off, err = p.integer(math.MaxInt64); err != nil {
		return r, err
	}
	if r.Len, err = p.integer(math.MaxInt64); err != nil {
		return r, err
	}
	return r, p.delim(']')
}

// object has value read each value of an object of at most max keys, none of which is there twice: they are in seen.
func (p *parser) object(value func(key string) error, seen map[string]bool, max int) error {
	if err := p.delim('{'); err != nil {
		return err
	}
	for p.tokens.More() {
		t, err := p.token()
		if err != nil {
			return err
		}
		key, ok := t.(string)
		if !ok {
			return fmt.Errorf("%v stands where a key should", t)
		}
		if seen[key] {
			return fmt.Errorf("%.160q is there twice", key)
		}
		if len(seen) == max {
			return fmt.Errorf("there are more than %d keys", max)
		}
		if err := value(key); err != nil {
			return err
		}
		seen[key] = true
	}
	return p.delim('}')
}

func (p *parser) delim(want json.Delim) error {
	t, err := p.token()
	if err == nil && t != want {
		err = fmt.Errorf("%.80v stands where %q should", t, rune(want))
	}
	return err
}

func (p *parser) integer(most int64) (int64, error) {
	t, err := p.token()
	if err != nil {
		return 0, err
	}
	number, ok := t.(json.Number)
	n, err := strconv.ParseInt(number.String(), 10, 64)
	if !ok || err != nil || n < 0 || n > most {
		return 0, fmt.Errorf("%.80v stands where a whole number up to %d should", t, most)
	}
	return n, nil
}

func (p *parser) token() (json.Token, error) {
	t, err := p.tokens.Token()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return t, err
}

// Encode is the form of a file. It fails for a profile that Parse would not take again.
func (p *Profile) Encode() ([]byte, error) {
	b := append([]byte(nil), `{"version":1,"blobs":{`...)
	reads := 0
	for i, blob := range p.Blobs {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(strconv.AppendQuote(b, blob.Digest), `:{"size":`...)
		b = append(strconv.AppendInt(b, blob.Size, 10), `,"reads":[`...)
		for k, r := range blob.Reads {
			if k > 0 {
				b = append(b, ',')
			}
			b = append(strconv.AppendInt(append(b, '['), int64(r.Order), 10), ',')
			b = append(strconv.AppendInt(b, r.Off, 10), ',')
			b = append(strconv.AppendInt(b, r.Len, 10), ']')
		}
		b = append(b, "]}"...)
		reads += len(blob.Reads)
	}
	b = append(b, "}}\n"...)
	if len(b) > maxFile || reads > maxReads || len(p.Blobs) > maxBlobs {
		return nil, fmt.Errorf("profile: %d reads of %d blobs, %d bytes, are more than a profile may have (%d, %d, %d)",
			reads, len(p.Blobs), len(b), maxReads, maxBlobs, maxFile)
	}
	return b, nil
}

// WriteFile gives a file the profile as its content, at once: whoever reads it finds what was there before or all of
// this, even if the machine stops. Only its owner may read it.
func WriteFile(name string, p *Profile) (err error) {
	raw, err := p.Encode()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	f, name, err := create(name)
	if err != nil {
		return err
	}
	if _, err = f.Write(raw); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		err = errors.Join(err, os.Remove(f.Name()))
	}
	return err
}

// CheckFile says why WriteFile could not write there; it leaves the file alone.
func CheckFile(name string) error {
	f, _, err := create(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// create makes a file that is to take the name of another, which real is without links. What is there must be a file: a
// rename would replace a device, too.
func create(name string) (f *os.File, real string, err error) {
	real = name
	if st, err := os.Lstat(name); err == nil && st.Mode()&os.ModeSymlink != 0 {
		if real, err = filepath.EvalSymlinks(name); err != nil {
			return nil, "", err
		}
	}
	if st, err := os.Lstat(real); err == nil && !st.Mode().IsRegular() {
		return nil, "", fmt.Errorf("%s: it is there, and not a regular file", name)
	}
	if f, err = os.CreateTemp(filepath.Dir(real), "."+filepath.Base(real)+".*"); err != nil {
		return nil, "", fmt.Errorf("%s: %w", name, withoutPath(err))
	}
	return f, real, nil
}

// withoutPath is why, without the name of a file that nobody has asked for.
func withoutPath(err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		return at.Err
	}
	return err
}
