package blobcache

import (
	"testing"
	"testing/synctest"
	"time"
)

// TestQueueInTrouble has many more readers than fetches may be under way, of a server that lets each fetch wait for a
// minute and then fail. No reader waits for those before it and then as long again.
func TestQueueInTrouble(t *testing.T) {
	const wait, readers = time.Minute, 40
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		s.answer = func(_ int, a *answer) {
			time.Sleep(wait)
			a.err = errServer
		}
		b := open(t, s, Options{MaxFetches: 2})
		began := time.Now()
		took := make(chan time.Duration, readers)
		for i := range int64(readers) {
			go func() {
				if err := readNow(ctx, b, s, 2*i*cs, 1); err == nil {
					t.Error("read, in spite of the fault")
				}
				took <- time.Since(began)
			}()
		}
		for range readers {
			if d := <-took; d < wait || d > wait+2*quiet {
				t.Errorf("a reader waited %v", d)
			}
		}
	})
}

// TestQueueThatMoves has readers wait in line for much longer than quiet, as long as bytes come: no more fetches are
// under way than may be.
func TestQueueThatMoves(t *testing.T) {
	stage(t, func(t *testing.T) {
		s := newServer(100 * cs)
		s.answer = func(int, *answer) { time.Sleep(quiet - time.Second) }
		b := open(t, s, Options{MaxFetches: 1})
		const readers = 20
		done := make(chan error, readers)
		for i := range int64(readers) {
			go func() { done <- readNow(ctx, b, s, 2*i*cs, 1) }()
		}
		for n := range readers {
			synctest.Wait()
			if asked := len(s.asked()); asked != n+1 {
				t.Errorf("%d requests while %d readers were served", asked, n)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}
