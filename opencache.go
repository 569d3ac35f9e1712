package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

// cacheDir chooses where fetched bytes are kept: where the user says, else where
// the user's caches are. A process without such a place (root of a user
// namespace, a service without HOME) uses a private directory and says so.
func (p *program) cacheDir(flag string, euid int) (string, error) {
	if flag != "" {
		return flag, nil
	}
	if dir := p.usualCacheDir(euid); dir != "" {
		err := backend.PrivateDir(dir)
		if err == nil {
			return dir, nil
		}
		if !errors.Is(err, os.ErrPermission) && !errors.Is(err, syscall.EROFS) {
			return "", fmt.Errorf("cache directory: %w; choose another with --cache-dir", err)
		}
	}
	instead := filepath.Join(backend.TempDir(), "cache")
	if err := errors.Join(backend.PrivateDir(backend.TempDir()), backend.PrivateDir(instead)); err != nil {
		return "", fmt.Errorf("cache directory: %w; choose one with --cache-dir", err)
	}
	fmt.Fprintf(p.stderr, "erofs-oci: no cache directory of yours can be written; using %s (--cache-dir chooses another)\n", instead)
	return instead, nil
}

// usualCacheDir is where the user's caches are, "" if that is not known.
func (p *program) usualCacheDir(euid int) string {
	switch xdg, home := p.getenv("XDG_CACHE_HOME"), p.getenv("HOME"); {
	case filepath.IsAbs(xdg):
		return filepath.Join(xdg, "erofs-oci")
	case euid == 0:
		return "/var/cache/erofs-oci"
	case filepath.IsAbs(home):
		return filepath.Join(home, ".cache", "erofs-oci")
	}
	return ""
}

// openCache opens the cache, and the records next to it.
func (p *program) openCache(o *opened, s *sourceOptions, log *slog.Logger) error {
	choose := p.cacheDir
	if s.offline {
		choose = p.existingCacheDir
	}
	dir, err := choose(s.cacheDir, os.Geteuid())
	if err != nil {
		return err
	}
	keep, err := s.cacheOptions(log)
	if err != nil {
		return err
	}
	o.dir = dir
	if o.cache, err = blobcache.New(dir, keep); err != nil {
		if s.offline && errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: nothing is kept in %s: %w", s.ref, printable(dir), errNeverMounted)
		}
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
			err = fmt.Errorf("%w; name a directory that you can write with --cache-dir", err)
		}
		return err
	}
	if o.records, o.noRecords = openRecords(dir); o.noRecords != nil {
		// Only --offline needs them, and not where a digest is mounted.
		log.Warn("what tags lead to is not remembered; --offline will not find it", "err", o.noRecords)
	}
	return nil
}

// cacheOptions are those of the cache that s is read through.
func (s *sourceOptions) cacheOptions(log *slog.Logger) (blobcache.Options, error) {
	keep, err := s.keep.options(log)
	if err != nil {
		return keep, err
	}
	keep.PrefetchRate, keep.MaxPrefetches = s.prefetch.bytesPerSecond, s.prefetch.atOnce()
	keep.OneAtATime = s.client.MaxConnsPerHost == 1
	s.meter.measureCache(&keep)
	if wait := s.client.ErrorWait; wait > 0 {
		keep.Patience = min(blobcache.DefaultPatience, wait) // for another process, in place of the registry
	}
	if s.offline {
		keep.Existing = true
		keep.Readahead = -1
		keep.Patience = time.Millisecond // what another process may fetch is not here
	}
	return keep, nil
}

// openKeeper opens the cache, and what keeps there the documents of the repository that ref is of.
func (p *program) openKeeper(o *opened, ref registry.Reference, s *sourceOptions, log *slog.Logger) (*registry.Repository, error) {
	if err := p.openCache(o, s, log); err != nil {
		return nil, err
	}
	repository := o.client.Repository(ref)
	from, err := repository.Origin()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	o.keeper = newKeeper(o, ref, from, log)
	return repository, nil
}

// resolve finds the image that s names: from the registry, as far as it has to be asked, or from what is kept.
func (p *program) resolve(ctx context.Context, o *opened, s *sourceOptions, log *slog.Logger) error {
	repository, err := p.openKeeper(o, s.ref.registry, s, log)
	if err != nil {
		return err
	}
	keep := registry.Keep{Documents: o.keeper, Tags: o.keeper}
	if s.offline {
		keep.Offline = errOffline
	}
	o.image, err = registry.ResolveIn(ctx, repository.Keep(keep), "", s.selector)
	if !s.offline && unreachable(err) {
		if _, never := o.keeper.Last(s.ref.registry.Tag); never == nil {
			err = fmt.Errorf("%w; --offline takes what it led to the last time", err)
		}
	}
	return err
}

// openRecordedCache opens the cache for layers that come from a record. The documents of their image are not needed, but are
// to stay with them.
func (p *program) openRecordedCache(ctx context.Context, o *opened, ref registry.Reference, s *sourceOptions, log *slog.Logger) error {
	if _, err := p.openKeeper(o, ref, s, log); err != nil {
		return err
	}
	o.keeper.hold(ctx, o.image.Digest)
	index := ref.Digest
	if index == "" {
		index, _ = o.keeper.Last(ref.Tag) // where nothing is known of it, there is nothing to hold
	}
	o.keeper.hold(ctx, index)
	return nil
}
