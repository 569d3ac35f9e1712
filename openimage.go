package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/urfave/cli/v2"

	"github.com/erofs-oci/erofs-oci/erofsfmt"
)

// openedImage is an image that a command reads by itself.
type openedImage struct {
	*opened
	Image *erofsfmt.Image
	ctx   context.Context
}

// Close ends the reading. Where all of a layer was read it is known by then whether it was
// right, and the error says so if it was not.
func (o *openedImage) Close() error {
	for _, l := range o.layers {
		l.blob.settle(o.ctx)
	}
	return o.opened.Close()
}

// openImage opens the image that ref names, for a command with the imageFlags.
// oneLayer is as in sourceOptions. Errors of Image are to be passed through explain.
func (p *program) openImage(c *cli.Context, ref string, oneLayer bool, log *slog.Logger) (*openedImage, error) {
	s, err := p.readSourceOptions(c, ref, log)
	if err != nil {
		return nil, err
	}
	s.oneLayer = oneLayer
	o, err := p.open(c.Context, s, log)
	if err != nil {
		return nil, err
	}
	im, err := o.openErofs(c.Context, s.memory)
	if err != nil {
		return nil, errors.Join(o.explain(err), o.Close())
	}
	o.remember()
	return &openedImage{opened: o, Image: im, ctx: c.Context}, nil
}

// withImage opens the image that ref names for the time of do. Several layers are one
// image.
func (p *program) withImage(c *cli.Context, ref string, do func(context.Context, *erofsfmt.Image) error) error {
	return p.withOpened(c, ref, false, do)
}

// withOneLayer is withImage for who looks at how one layer is stored.
func (p *program) withOneLayer(c *cli.Context, ref string, do func(context.Context, *erofsfmt.Image) error) error {
	return p.withOpened(c, ref, true, do)
}

func (p *program) withOpened(c *cli.Context, ref string, oneLayer bool, do func(context.Context, *erofsfmt.Image) error) (err error) {
	log, err := p.newCommandLog(c)
	if err != nil {
		return err
	}
	o, err := p.openImage(c, ref, oneLayer, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.Close()) }()
	if err := do(c.Context, o.Image); err != nil {
		return o.explain(err)
	}
	return nil
}
