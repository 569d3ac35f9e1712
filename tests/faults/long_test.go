package faults

import (
	"context"
	"encoding/base64"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/erofs-oci/erofs-oci/registry"
	"github.com/erofs-oci/erofs-oci/tests/fakeregistry"
)

var length = flag.Duration("long", 12*time.Second, "how long TestLongMount goes on; a minute is an hour of a mount whose tokens live two minutes")

const (
	tokenLife = 2 * time.Second
	urlLife   = 3 * time.Second
	rotation  = 2500 * time.Millisecond
)

// TestLongMount reads for as long as -long says, from a registry whose tokens live
// 2 s whose storage takes a URL for
// 3 s, and whose password changes on disk and in the registry every 2.5 s. No read
// fails, and no more is asked for than expires.
func TestLongMount(t *testing.T) {
	aloneHere(t)
	if testing.Short() {
		*length = min(*length, 6*time.Second)
	}
	login := filepath.Join(t.TempDir(), "auth.json")
	o := fakeregistry.Options{Auth: fakeregistry.Bearer, Username: user, Password: password, TokenLife: tokenLife, SignedURLs: urlLife}
	b := &bed{t: t, row: row{name: "an hour"}, registry: newRegistry(t, o), log: &record{}}
	now := password
	rotate := func(n int) {
		next := fmt.Sprintf("%s-%d", password, n)
		b.registry.SetCredentials(user, now, next)
		writeLogin(t, login, b.registry.Addr(), next)
		b.registry.SetCredentials(user, next)
		now = next
	}
	rotate(0)
	b.open(registry.Options{
		PlainHTTP: true, AuthFile: login, RegistriesConf: b.registriesConf(), Logger: slog.New(slog.NewTextHandler(b.log, nil)),
		ErrorWait: patience, NoProgress: patience / 2,
	}, hugeDigest, hugeSize)

	ctx, cancel := context.WithTimeout(t.Context(), *length)
	defer cancel()
	var all sync.WaitGroup
	all.Go(func() {
		for n := 1; ctx.Err() == nil; n++ {
			select {
			case <-time.After(rotation):
				rotate(n)
			case <-ctx.Done():
			}
		}
	})
	for reader := range 4 {
		all.Go(func() { b.readSlowly(ctx, reader) })
	}
	all.Wait()

	front, storage := b.registry.Stats(), b.registry.Storage().Stats()
	lives, urls, changes := int(*length/tokenLife)+1, int(*length/urlLife)+1, int(*length/rotation)+1
	t.Logf("%v: %d tokens, %d signed URLs, %d reads of storage, %d changes of the password", *length, front.Tokens, front.BlobGETs, storage.BlobGETs, changes)
	// A token is fetched anew a fifth of its life early.
	if most := lives*5/4 + 2*changes; front.Tokens > most || front.Tokens < lives/3 {
		t.Errorf("%d requests for tokens in %v, want %d at most", front.Tokens, *length, most)
	}
	// Four readers may find a URL expired at the same time; each asks once, and once
	// more with a token.
	if most := 8 * urls; front.BlobGETs > most || front.BlobGETs < urls/2 {
		t.Errorf("the registry was asked for the blob %d times in %v, want %d at most", front.BlobGETs, *length, most)
	}
}

// writeLogin writes a file as podman login does.
func writeLogin(t *testing.T, path, host, secret string) {
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + secret))
	err := os.WriteFile(path+".new", fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, host, auth), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Error(err)
	}
}

// readSlowly reads here and there, mostly what was never read before, at a pace that
// lasts.
func (b *bed) readSlowly(ctx context.Context, reader int) {
	rng := rand.New(rand.NewPCG(uint64(reader), 9))
	pace := time.NewTicker(50 * time.Millisecond)
	defer pace.Stop()
	for {
		select {
		case <-pace.C:
			b.read(span{rng.Int64N(hugeSize - 4096), 4096})
		case <-ctx.Done():
			return
		}
	}
}
