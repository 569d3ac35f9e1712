package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/erofs-oci/erofs-oci/backend"
	"github.com/erofs-oci/erofs-oci/registry/blobcache"
)

// existingCacheDir is cacheDir for who only looks: nothing is made. One that the user names must be there, since it would
// be another one if it was mistyped; of the usual ones the name is given of that which is there, or would be.
func (p *program) existingCacheDir(flag string, euid int) (string, error) {
	if flag != "" {
		if _, err := os.Stat(flag); errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("cache directory %s does not exist; look at --cache-dir", printable(flag))
		}
		return flag, nil // what else may be wrong with it is said when it is opened
	}
	usual, instead := p.usualCacheDir(euid), filepath.Join(backend.TempDir(), "cache")
	if usual != "" {
		if _, err := os.Lstat(usual); err == nil {
			return p.cacheDir("", euid)
		}
	}
	if _, err := os.Lstat(instead); err == nil || usual == "" {
		return instead, nil
	}
	return usual, nil
}

// A cacheLook is the cache that a command is about. Where there is none yet, nothing is kept, and nothing is made.
type cacheLook struct {
	*blobcache.Cache // nil: there is none
	dir              string
	options          blobcache.Options
}

// lookAtCache opens the cache if there is one.
func lookAtCache(dir string, o blobcache.Options) (cacheLook, error) {
	o.Existing = true
	cache, err := blobcache.New(dir, o)
	if errors.Is(err, fs.ErrNotExist) {
		return cacheLook{nil, dir, o}, nil
	}
	return cacheLook{cache, dir, o}, err
}

func (l cacheLook) close() error {
	if l.Cache == nil {
		return nil
	}
	return l.Cache.Close()
}

func (l cacheLook) list() ([]blobcache.Kept, error) {
	if l.Cache == nil {
		return []blobcache.Kept{}, nil
	}
	return l.List()
}

func (l cacheLook) usage() (blobcache.Usage, error) {
	if l.Cache == nil {
		return blobcache.UsageOfNone(l.dir, l.options)
	}
	return l.Usage()
}

func (l cacheLook) prune(keep int64) (freed int64, err error) {
	if l.Cache == nil {
		return 0, nil
	}
	freed, err = l.Prune(keep)
	return freed, errors.Join(err, forgetRecords(l.Cache))
}

func (l cacheLook) remove(digests []string) (freed int64, err error) {
	var errs []error
	for _, d := range digests {
		if l.Cache == nil {
			errs = append(errs, fmt.Errorf("blob %s is not in the cache: %s does not exist", d, l.dir))
			continue
		}
		n, err := l.Remove(d)
		freed, errs = freed+n, append(errs, err)
	}
	if l.Cache != nil {
		errs = append(errs, forgetRecords(l.Cache))
	}
	return freed, errors.Join(errs...)
}

func (l cacheLook) verify(ctx context.Context) ([]blobcache.Check, error) {
	checks := []blobcache.Check{}
	if l.Cache == nil {
		return checks, nil
	}
	err := l.Verify(ctx, func(check blobcache.Check) error {
		checks = append(checks, check)
		return nil
	})
	return checks, err
}
