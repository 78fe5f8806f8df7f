package api

import (
	"context"
	"errors"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/wire"
)

// ListImages answers GET /v1/images.
func (s *server) ListImages(_ context.Context, r wire.ListImagesRequestObject) (wire.ListImagesResponseObject, error) {
	images, err := s.Images.List()
	if err != nil {
		return nil, err
	}
	by := imageOrder()
	images, next, err := by.cut(images, r.Params.Limit, r.Params.After)
	if err != nil {
		return nil, err
	}
	out := make([]wire.Image, 0, len(images))
	for _, i := range images {
		out = append(out, imageOf(i))
	}
	return page[wire.Image]{items: out, path: by.path, limit: r.Params.Limit, next: next}, nil
}

// BuildImage answers POST /v1/images.
func (s *server) BuildImage(ctx context.Context, r wire.BuildImageRequestObject) (wire.BuildImageResponseObject, error) {
	req := image.BuildRequest{
		Name: r.Body.Name, Source: r.Body.Source, Warmup: r.Body.Warmup, Imports: r.Body.Imports, Refresh: r.Body.Refresh,
	}
	if err := req.Validate(); err != nil {
		return nil, invalid(err)
	}
	build := func(ctx context.Context) (wire.Image, error) {
		img, _, err := s.Images.Build(ctx, req)
		return imageOf(img), err
	}
	if wantsLines(ctx) {
		return lines{ctx, func(ctx context.Context) (any, error) { return build(ctx) }}, nil
	}
	img, err := build(ctx)
	return wire.BuildImage201JSONResponse(img), err
}

// GetImage answers GET /v1/images/{name}.
func (s *server) GetImage(_ context.Context, r wire.GetImageRequestObject) (wire.GetImageResponseObject, error) {
	img, err := s.Images.Get(r.Name)
	return wire.GetImage200JSONResponse(imageOf(img)), err
}

// DeleteImage answers DELETE /v1/images/{name}.
func (s *server) DeleteImage(ctx context.Context, r wire.DeleteImageRequestObject) (wire.DeleteImageResponseObject, error) {
	if err := s.Images.Remove(r.Name); err != nil {
		return nil, err
	}
	_, err := s.collectImages(ctx)
	return wire.DeleteImage204Response{}, err
}

// collectImages removes what has no name and what no snapshot is made of, and
// returns how many bytes that gave back. While an image is being built it
// removes nothing: the next time will do.
func (s *server) collectImages(ctx context.Context) (freed int64, err error) {
	snaps, err := s.Snapshots.List()
	if err != nil {
		return 0, err
	}
	used := map[string]bool{}
	for _, snap := range snaps {
		used[snap.Manifest.Image] = true
	}
	freed, err = s.Images.GC(ctx, func(digest string) bool { return used[digest] })
	if errors.Is(err, errdef.ErrConflict) {
		s.logger.InfoContext(ctx, "unused images stay", "error", err)
		return 0, nil
	}
	return freed, err
}

func imageOf(i image.Image) wire.Image {
	return wire.Image{
		Name: i.Name, Digest: i.Digest, Source: i.Manifest.Source, CreatedAtUnix: i.CreatedAt.Unix(), SizeBytes: i.SizeBytes(),
		Kernel: i.Manifest.KernelVersion, Warmup: list(i.Manifest.Warmup), Imports: list(i.Manifest.Imports),
	}
}

// list makes an absent list an empty one, which JSON tells apart.
func list[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}

// invalid puts an error of a request's validation into that category, unless
// it is in one.
func invalid(err error) error {
	if errdef.Code(err) != "internal" {
		return err
	}
	return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
}
