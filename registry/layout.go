package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"syscall"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Layout is a directory that holds an OCI image layout: a Store and a Sink. No
// symbolic link in it is followed out of it.
//
// Files appear whole: each is written under another name, synced, and renamed.
// Several processes may write at the same time; index.json is changed under a lock
// of the directory (flock).
type Layout struct {
	shelf
	root *os.Root
}

// OpenLayout opens the layout in the directory path. name is the
// org.opencontainers.image.ref.name of the image that is meant; "" is the only one.
func OpenLayout(path, name string) (*Layout, error) {
	l, err := openLayout(path, name)
	if err != nil {
		return nil, fmt.Errorf("oci:%s: %w", path, err)
	}
	if err := l.checkVersion(); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("not an OCI image layout: %w", err)
		}
		return nil, errors.Join(fmt.Errorf("oci:%s: %w", path, err), l.Close())
	}
	return l, nil
}

// CreateLayout is OpenLayout, but makes the directory and the layout where they are
// missing. It refuses a directory that holds other things.
func CreateLayout(path, name string) (*Layout, error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, fmt.Errorf("oci:%s: %w", path, err)
	}
	l, err := openLayout(path, name)
	if err != nil {
		return nil, fmt.Errorf("oci:%s: %w", path, err)
	}
	if err := l.locked(l.create); err != nil {
		return nil, errors.Join(fmt.Errorf("oci:%s: %w", path, err), l.Close())
	}
	return l, nil
}

func openLayout(path, name string) (*Layout, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	l := &Layout{root: root}
	l.shelf = shelf{what: "oci:" + path, name: name, open: l.openFile}
	return l, nil
}

// Close lets go of the directory.
func (l *Layout) Close() error { return l.root.Close() }

// String is oci:PATH[:NAME].
func (l *Layout) String() string { return l.title("") }

// Manifest implements Store. A target that is no digest is a name.
func (l *Layout) Manifest(ctx context.Context, target string) (Document, error) {
	return manifestIn(ctx, l, target)
}

// Blob implements Store.
func (l *Layout) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return blobIn(ctx, l, desc)
}

// openFile opens a regular file. What else there may be under the name, a pipe
// say, must not hold us up.
func (l *Layout) openFile(name string) (io.ReadCloser, int64, error) {
	f, err := l.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, fi.Size(), nil
}

// create makes what is missing, under the lock.
func (l *Layout) create() error {
	err := l.checkVersion()
	if errors.Is(err, fs.ErrNotExist) {
		if err := l.checkEmpty(); err != nil {
			return err
		}
		err = l.writeJSON(ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	}
	if err != nil {
		return err
	}
	if err := l.root.MkdirAll(ocispec.ImageBlobsDir+"/sha256", 0o755); err != nil {
		return err
	}
	_, err = l.root.Stat(indexFile)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	index.SchemaVersion = 2
	return l.writeJSON(indexFile, index)
}

func (l *Layout) checkEmpty() error {
	d, err := l.root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(1)
	if len(names) > 0 {
		return fmt.Errorf("the directory holds %s and is not an OCI image layout; give an empty one", clean(names[0], 100))
	}
	if err != io.EOF {
		return err
	}
	return nil
}

// locked runs f while no other process changes the layout.
func (l *Layout) locked(f func() error) error {
	d, err := l.root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close() // and with it the lock goes
	for {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX)
		if err == nil {
			return f()
		}
		if err != syscall.EINTR {
			return fmt.Errorf("lock: %w", err)
		}
	}
}

// PutBlob implements Sink. A blob that is there with the size of desc is not
// written again; one of another size is damaged, and is replaced.
func (l *Layout) PutBlob(ctx context.Context, desc ocispec.Descriptor, content io.ReaderAt, o PutOptions) (PutResult, error) {
	result, err := l.putBlob(ctx, desc, content, o.Progress)
	if err != nil {
		return PutResult{}, fmt.Errorf("%s: blob %s: %w", l.what, clean(desc.Digest.String(), 160), err)
	}
	return result, nil
}

func (l *Layout) putBlob(ctx context.Context, desc ocispec.Descriptor, content io.ReaderAt, progress func(int64)) (PutResult, error) {
	if err := checkBlob(desc); err != nil {
		return PutResult{}, err
	}
	name := blobName(desc.Digest)
	fi, err := l.root.Lstat(name)
	if err == nil && fi.Mode().IsRegular() && fi.Size() == desc.Size {
		return PutResult{Existed: true}, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return PutResult{}, err
	}
	if err := l.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return PutResult{}, err
	}
	err = l.write(name, func(w io.Writer) error { return copyVerified(ctx, w, desc, content, progress) })
	return PutResult{Sent: desc.Size}, err
}

// copyVerified copies the blob that desc describes, and fails if it is not that.
func copyVerified(ctx context.Context, w io.Writer, desc ocispec.Descriptor, content io.ReaderAt, progress func(int64)) error {
	verifier := desc.Digest.Verifier()
	buf := make([]byte, 1<<20)
	for done := int64(0); done < desc.Size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := content.ReadAt(buf[:min(int64(len(buf)), desc.Size-done)], done)
		if n == 0 {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("reading at %d of %d: %w", done, desc.Size, err)
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		_, _ = verifier.Write(buf[:n]) // a hash takes everything
		if done += int64(n); progress != nil {
			progress(done)
		}
	}
	if !verifier.Verified() {
		return errors.New("the content does not have this digest")
	}
	return nil
}

// write makes a file appear whole, or not at all.
func (l *Layout) write(name string, fill func(io.Writer) error) (err error) {
	dir := path.Dir(name)
	temp := dir + "/.tmp-" + rand.Text()
	f, err := l.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = l.root.Rename(temp, name)
	}
	if err != nil {
		return errors.Join(err, l.root.Remove(temp))
	}
	return l.syncDir(dir)
}

// syncDir has a rename last.
func (l *Layout) syncDir(dir string) error {
	d, err := l.root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (l *Layout) writeJSON(name string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return l.write(name, func(w io.Writer) error {
		_, err := w.Write(raw)
		return err
	})
}

// PutManifest implements Sink. With a target the manifest is listed in index.json
// under that name, in place of what had it before. Without one it is listed with no
// name, until an index that holds it is put: a layout lists what it is about, and
// what is put by digest alone is a part of that most often.
func (l *Layout) PutManifest(ctx context.Context, target, mediaType string, raw []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	err := l.putManifest(ctx, target, &desc, raw)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: manifest %s: %w", l.what, clean(target, 200), err)
	}
	return desc, nil
}

func (l *Layout) putManifest(ctx context.Context, target string, desc *ocispec.Descriptor, raw []byte) (err error) {
	ref := Reference{}
	if checkDigest(digest.Digest(target)) == nil {
		ref.Digest, target = digest.Digest(target), ""
	}
	if err := checkName(target); err != nil {
		return err
	}
	if desc.Digest, err = checkManifest(ref, desc.MediaType, raw); err != nil {
		return err
	}
	if _, err := l.putBlob(ctx, *desc, bytes.NewReader(raw), nil); err != nil {
		return err
	}
	var parts ocispec.Index
	if isIndexType(desc.MediaType) {
		if err := json.Unmarshal(raw, &parts); err != nil {
			return err
		}
	}
	return l.locked(func() error { return l.list(target, *desc, parts.Manifests) })
}

// checkName accepts what can be told from another name when it is printed.
func checkName(name string) error {
	if clean(name, 255) != name {
		return fmt.Errorf("name %q is too long, or not one printable word", clean(name, 255))
	}
	return nil
}

// list enters desc into index.json. What else stands there stays as it is, fields
// that are not known here as well.
func (l *Layout) list(name string, desc ocispec.Descriptor, parts []ocispec.Descriptor) error {
	raw, err := l.file(indexFile, maxManifest)
	if err != nil {
		return err
	}
	raw, err = listed(raw, name, desc, parts)
	if err != nil {
		return fmt.Errorf("%s: %w", indexFile, err)
	}
	if len(raw) > maxManifest {
		return fmt.Errorf("%s: more than %d bytes; begin a new layout", indexFile, maxManifest)
	}
	return l.write(indexFile, func(w io.Writer) error {
		_, err := w.Write(raw)
		return err
	})
}

// listed is the index.json that raw becomes.
func listed(raw []byte, name string, desc ocispec.Descriptor, parts []ocispec.Descriptor) ([]byte, error) {
	var fields map[string]json.RawMessage
	var entries []json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, err
	}
	if fields == nil {
		return nil, errors.New("is null")
	}
	if old := fields["manifests"]; old != nil {
		if err := json.Unmarshal(old, &entries); err != nil {
			return nil, err
		}
	}
	kept, known := []json.RawMessage{}, false
	for _, entry := range entries {
		var e ocispec.Descriptor
		if err := json.Unmarshal(entry, &e); err != nil {
			return nil, err
		}
		called := e.Annotations[ocispec.AnnotationRefName]
		named := called != "" || e.Annotations[annotationContainerdName] != ""
		switch {
		case name != "" && called == name: // replaced
		case !named && (e.Digest == desc.Digest || partOf(e.Digest, parts)): // has a name now, or an index that has one
		default:
			kept = append(kept, entry)
			known = known || e.Digest == desc.Digest
		}
	}
	if name != "" {
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	}
	if name != "" || !known {
		entry, err := json.Marshal(desc)
		if err != nil {
			return nil, err
		}
		kept = append(kept, entry)
	}
	var err error
	if fields["manifests"], err = json.Marshal(kept); err != nil {
		return nil, err
	}
	return json.Marshal(fields)
}

func partOf(d digest.Digest, parts []ocispec.Descriptor) bool {
	return slices.ContainsFunc(parts, func(p ocispec.Descriptor) bool { return p.Digest == d })
}
