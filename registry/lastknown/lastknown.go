// Package lastknown remembers, in a directory, what references led to when a registry was asked the last time: a tag is
// nobody's promise, so without the registry its last known manifest is all there is to go by.
//
// A record is a file of its own, under a name that is a hash of the reference and of who was asked:
//
//	references/HASH    {"reference": …, "origin": …, "digest": …}
//	                   a CRC-32C of that line, in hex
//
// It is written under another name and renamed, so that a reader finds the old one, the new one or none. Nothing is
// synced: what a power failure leaves is noticed by the checksum, and counts as no record. So does whatever else lies
// there. There are at most as many as Options.Most; the one that was written longest ago goes first.
//
// A record says which manifest is meant and nothing about its bytes: those have the digest, or are not used. There is
// no secret in it. The directory is the caller's to make, for himself alone.
package lastknown

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// An Entry is what is known of one reference.
type Entry struct {
	Reference string `json:"reference"` // HOST/REPOSITORY:TAG
	Origin    string `json:"origin"`    // who was asked, and how sure it is that it was he who answered
	Digest    string `json:"digest"`    // of the manifest or index
}

// Options of a Store. The zero value works.
type Options struct {
	Most int // records; 1000 if zero
}

const (
	defaultMost = 1000
	// maxRecord is more than a record takes: a reference has a few hundred bytes, and an origin as many for each mirror.
	maxRecord = 64 << 10
	// newPrefix begins the names of files that are being written, and staleAfter is when their writer is dead.
	newPrefix  = "new-"
	staleAfter = time.Hour
)

// A Store is a directory of records. Its methods may be called in parallel, also by several processes.
type Store struct {
	root *os.Root
	most int
}

// Open opens a directory.
func Open(dir string, o Options) (*Store, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("records of references: %w", err)
	}
	return &Store{root: root, most: cmp.Or(o.Most, defaultMost)}, nil
}

// Close lets go of the directory.
func (s *Store) Close() error { return s.root.Close() }

func nameOf(reference, origin string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q", reference, origin))
	return hex.EncodeToString(sum[:])
}

func isName(name string) bool {
	b, err := hex.DecodeString(name)
	return err == nil && len(b) == sha256.Size && strings.ToLower(name) == name
}

// Get is what is known of a reference. The error is fs.ErrNotExist where that is nothing, and ErrDamaged as well where
// that is nothing that can be read.
func (s *Store) Get(reference, origin string) (Entry, error) {
	e, err := s.read(nameOf(reference, origin))
	if err == nil && (e.Reference != reference || e.Origin != origin) {
		err = ErrDamaged
	}
	if errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("record of %s: %w", reference, err)
	}
	return e, nil
}

// ErrDamaged says that there is something where a record would be, and that it is none.
var ErrDamaged = errors.New("the record is damaged")

func (s *Store) read(name string) (Entry, error) {
	info, err := s.root.Lstat(name)
	if err != nil {
		return Entry{}, err
	}
	if !info.Mode().IsRegular() {
		return Entry{}, ErrDamaged // a link, say, or a pipe, which would hold us up
	}
	f, err := s.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Entry{}, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return Entry{}, err
	}
	return decode(raw)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func sumOf(line []byte) string { return fmt.Sprintf("%08x\n", crc32.Checksum(line, castagnoli)) }

func encode(e Entry) ([]byte, error) {
	line, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	line = append(line, '\n')
	if raw := append(line, sumOf(line)...); len(raw) <= maxRecord {
		return raw, nil
	}
	return nil, fmt.Errorf("%d bytes are too many for a record", len(line))
}

func decode(raw []byte) (e Entry, err error) {
	end := bytes.IndexByte(raw, '\n') + 1
	if len(raw) > maxRecord || string(raw[end:]) != sumOf(raw[:end]) {
		return Entry{}, ErrDamaged
	}
	if json.Unmarshal(raw[:end], &e) != nil {
		return Entry{}, ErrDamaged
	}
	return e, nil
}

// Put remembers what a reference led to.
func (s *Store) Put(e Entry) error {
	raw, err := encode(e)
	if err == nil {
		err = s.write(nameOf(e.Reference, e.Origin), raw)
	}
	if err != nil {
		return fmt.Errorf("record of %s: %w", e.Reference, err)
	}
	return nil
}

func (s *Store) write(name string, raw []byte) error {
	fresh := newPrefix + rand.Text()
	f, err := s.root.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err = errors.Join(err, f.Close()); err == nil {
		err = s.root.Rename(fresh, name)
	}
	if err != nil {
		return errors.Join(err, ignoreGone(s.root.Remove(fresh)))
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// names are those of the files that there are.
func (s *Store) names() ([]string, error) {
	dir, err := s.root.Open(".")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(-1)
}

// Trim removes the oldest records where there are too many, and what dead writers left. It is for who has put one.
func (s *Store) Trim() error {
	if err := s.trim(); err != nil {
		return fmt.Errorf("records of references: %w", err)
	}
	return nil
}

func (s *Store) trim() error {
	names, err := s.names()
	if err != nil {
		return err
	}
	var records []string
	for _, name := range names {
		if isName(name) {
			records = append(records, name)
		} else if strings.HasPrefix(name, newPrefix) {
			if err := s.removeStale(name); err != nil {
				return err
			}
		}
	}
	if len(records) <= s.most {
		return nil // which is nearly always, and costs no look at the files
	}
	var all []fs.FileInfo
	for _, name := range records {
		info, err := s.root.Lstat(name)
		if err == nil {
			all = append(all, info)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	slices.SortFunc(all, func(a, b fs.FileInfo) int {
		return cmp.Or(a.ModTime().Compare(b.ModTime()), strings.Compare(a.Name(), b.Name()))
	})
	for _, info := range all[:max(len(all)-s.most, 0)] {
		if err := ignoreGone(s.root.Remove(info.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) removeStale(name string) error {
	info, err := s.root.Lstat(name)
	if err != nil || time.Since(info.ModTime()) <= staleAfter {
		return ignoreGone(err)
	}
	return ignoreGone(s.root.Remove(name))
}

// Remove removes the records for which gone is true, and those that cannot be read, and says how many. A record that is
// written meanwhile stays: it was not asked about.
func (s *Store) Remove(gone func(Entry) (bool, error)) (n int, err error) {
	names, err := s.names()
	for _, name := range names {
		removed := false
		if isName(name) && err == nil {
			removed, err = s.removeIf(name, gone)
		}
		if removed {
			n++
		}
	}
	if err != nil {
		return n, fmt.Errorf("records of references: %w", err)
	}
	return n, nil
}

func (s *Store) removeIf(name string, gone func(Entry) (bool, error)) (removed bool, err error) {
	before, err := s.root.Lstat(name)
	if err != nil {
		return false, ignoreGone(err)
	}
	e, err := s.read(name)
	remove := errors.Is(err, ErrDamaged)
	if err == nil {
		remove, err = gone(e)
	}
	if !remove {
		return false, ignoreGone(err)
	}
	now, err := s.root.Lstat(name)
	if err != nil || !os.SameFile(before, now) || !now.ModTime().Equal(before.ModTime()) {
		return false, ignoreGone(err)
	}
	err = ignoreGone(s.root.Remove(name))
	return err == nil, err
}
